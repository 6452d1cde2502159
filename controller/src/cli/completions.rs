//! `tideshift completions`: shell completion scripts.

use super::{Cli, Failure, print};
use clap::CommandFactory;
use clap_complete::Shell;

/// Print completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  tideshift completions bash > /etc/bash_completion.d/tideshift
  tideshift completions zsh > ~/.zfunc/_tideshift
  tideshift completions fish > ~/.config/fish/completions/tideshift.fish")]
pub(super) struct Arguments {
    /// The shell.
    shell: Shell,
}

impl Arguments {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "tideshift", &mut script);
        print(&String::from_utf8_lossy(&script))
    }
}
