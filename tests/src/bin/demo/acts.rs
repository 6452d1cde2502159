//! The acts of the demo.

use std::time::Duration;

use tideshift_tests::artifacts;
use tideshift_tests::backend::Errors;

use crate::document::HOST;
use crate::screen::{Narration, Screen};
use crate::show::Show;
use crate::stage::{ENDPOINTS, Stage, V1, V2, V3};
use crate::summary;

/// Requests per second.
const RATE: f64 = 300.0;
/// The rate after the demo.
const LOW_RATE: f64 = 20.0;
/// How long a change stays on the screen.
const SHORT: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(5);

/// Runs all acts; returns whether all went as expected. With `keep` it does not return.
pub(crate) async fn play(keep: bool) -> anyhow::Result<bool> {
    let (module, _, _) = (artifacts::wasm()?, artifacts::tideshift()?, artifacts::envoy()?);
    let mut screen = Screen::new();
    screen.say("Starting backends, the controller and Envoy with the module ...")?;
    let mut stage = Stage::set_up(&module).await?;
    stage.send(RATE);
    let mut show = Show::new(stage, screen, OVERTURE);
    overture(&mut show).await?;
    forward(&mut show).await?;
    back_and_forth(&mut show).await?;
    a_bad_release(&mut show).await?;

    let tally = show.stage.send_no_more().await?;
    show.screen.leave();
    let summary = summary::take(&mut show.stage, &tally).await?;
    for line in summary.lines(show.screen.elapsed()) {
        show.screen.say(&line)?;
    }
    match keep && summary.is_fine() {
        true => go_on(&mut show).await?,
        false => show.screen.say("  KEEP=1 make demo leaves it running")?,
    }
    Ok(summary.is_fine())
}

const OVERTURE: Narration = Narration {
    title: "v1 serves",
    text: "The document names three versions with 4 endpoints each. Only those of v1 are up, \
           so all requests go there. Each bar is what clients really got in the last second.",
};

async fn overture(show: &mut Show) -> anyhow::Result<()> {
    show.tell(OVERTURE)?;
    show.until("v1 serves", |view| view.weighs(V1, 100.0) && view.is_ready(V1, ENDPOINTS)).await?;
    show.linger(LONG).await
}

const FORWARD: Narration = Narration {
    title: "Act 1 of 3: v2 comes up, and traffic follows its readiness",
    text: "The document says `target: v2` now. Its endpoints start one after the other; \
           v2 gets only what those that are ready can carry. Look at weight and ready.",
};

async fn forward(show: &mut Show) -> anyhow::Result<()> {
    show.tell(FORWARD)?;
    show.stage.document.write(V1, Some(V2))?;
    show.until("the rollout starts", |view| view.phase == "Progressing").await?;
    show.linger(SHORT).await?;
    for ready in 1..=ENDPOINTS {
        show.stage.endpoints(V2)[ready - 1].start_again().await?;
        // The first step of the document's strategy is 10 %, for 3 s.
        let carried = 100.0 * ready as f64 / ENDPOINTS as f64;
        show.until("v2 gets what it can carry", |view| view.weighs(V2, carried)).await?;
        show.linger(SHORT).await?;
    }
    show.until("v2 serves everything", |view| view.phase == "Succeeded").await?;
    show.linger(SHORT).await
}

const BACK_AND_FORTH: Narration = Narration {
    title: "Act 2 of 3: half of v2 is not ready for a while",
    text: "Two endpoints of v2 answer 503 when they are probed. What the other two cannot carry \
           goes back to v1 and returns with them. No request fails.",
};

async fn back_and_forth(show: &mut Show) -> anyhow::Result<()> {
    show.tell(BACK_AND_FORTH)?;
    let set_ready = |show: &Show, ready| {
        show.stage.endpoints(V2).iter().skip(ENDPOINTS / 2).for_each(|endpoint| endpoint.set_ready(ready));
    };
    set_ready(show, false);
    show.until("v1 takes over half", |view| view.weighs(V1, 50.0) && view.weighs(V2, 50.0)).await?;
    show.linger(LONG).await?;
    set_ready(show, true);
    show.until("v2 serves everything again", |view| view.weighs(V2, 100.0)).await?;
    show.linger(LONG).await
}

const A_BAD_RELEASE: Narration = Narration {
    title: "Act 3 of 3: v3 is a bad release",
    text: "The document says `target: v3`, and v3 fails 3 of 10 requests. The proxy counts them; \
           as soon as they prove v3 worse than v2, its weight is taken away.",
};

async fn a_bad_release(show: &mut Show) -> anyhow::Result<()> {
    show.tell(A_BAD_RELEASE)?;
    for endpoint in show.stage.endpoints(V3) {
        endpoint.set(|behaviour| behaviour.errors = Errors { bad: 3, of: 10 });
        endpoint.start_again().await?;
    }
    show.until("v3 is ready", |view| view.is_ready(V3, ENDPOINTS)).await?;
    show.linger(SHORT).await?;
    show.stage.document.write(V2, Some(V3))?;
    show.until("v3 is taken back", |view| view.phase == "Failed").await?;
    show.linger(LONG).await
}

const ENCORE: Narration = Narration {
    title: "Still running, with 20 requests a second, until Ctrl-C",
    text: "Change the document: `target: v1` goes back, `target: v3` is the bad release again. \
           The numbers below have restarted.",
};

/// Never returns.
async fn go_on(show: &mut Show) -> anyhow::Result<()> {
    let (listener, controller) = (show.stage.listener(), show.stage.controller());
    let admin = show.stage.envoy().admin_address();
    let tideshift = artifacts::tideshift()?;
    let tideshift = tideshift.strip_prefix(std::env::current_dir()?).unwrap_or(&tideshift).display().to_string();
    let document = show.stage.document.path().display().to_string();
    show.screen.say("")?;
    for (what, how) in [
        ("call it", format!("curl -i -H 'host: {HOST}' http://{listener}/")),
        ("document", document),
        ("status", format!("{tideshift} status --watch --server http://{controller}")),
        ("why", format!("{tideshift} explain --host {HOST} --server http://{controller}")),
        ("page", format!("http://{controller}/")),
        ("controller", format!("http://{controller}/v1/status and http://{controller}/metrics")),
        ("Envoy", format!("http://{admin}/ and http://{admin}/stats/prometheus?filter=wasmcustom")),
    ] {
        show.screen.say(&format!("  {}  {how}", console::style(format!("{what:<10}")).dim()))?;
    }
    show.stage.send(LOW_RATE);
    show.start_anew();
    show.tell(ENCORE)?;
    loop {
        show.linger(LONG).await?;
    }
}
