//! `make bench`: what the filter costs on a real Envoy, against what Envoy does by itself and against others who do the
//! same job. Tables on the standard output, progress on the standard error; a failed request fails it.
//!
//! Machines that people have are noisy, so nothing here is a throughput: Envoy runs one worker on a core of its own,
//! and [`cost`] compares the CPU time of that worker between batches that follow one another.

mod client;
mod cost;
mod machine;
mod proxy;
mod server;
mod settings;
mod statistics;
mod tables;
mod variants;

use std::process::{self, ExitCode};

use machine::{Cores, pin};
use settings::Settings;
use variants::{Modules, NATIVE, WEIGHTS};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe bench failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let cores = Cores::choose()?;
    // Before there are other threads, which then stay there too.
    pin(process::id(), &[cores.others])?;
    tokio::runtime::Runtime::new()?.block_on(bench(cores))
}

async fn bench(cores: Cores) -> anyhow::Result<()> {
    let settings = Settings::read()?;
    let modules = Modules::find()?;
    let backends = WEIGHTS.iter().map(|(version, _)| server::serve(version)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut variants = variants::all(&modules);
    let wanted = |name: &str| settings.only.is_empty() || settings.only.iter().any(|only| name.contains(only));
    variants.retain(|variant| variant.name == NATIVE || wanted(&variant.name.to_lowercase()));
    let costs = cost::measure(&variants, &backends, cores, &settings).await?;
    print!("{}", tables::costs(&costs));
    Ok(())
}
