//! The loop that polls and draws, and how acts wait for what they show.

use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep};

use crate::screen::{Narration, Screen};
use crate::stage::Stage;
use crate::text::percent;
use crate::view::{Recent, View};

/// The polling interval.
const EVERY: Duration = Duration::from_millis(100);
/// The timeout of anything that an act waits for; a busy machine is slow.
const DEADLINE: Duration = Duration::from_secs(30);

/// The stage and its display.
pub(crate) struct Show {
    pub(crate) stage: Stage,
    pub(crate) screen: Screen,
    narration: Narration,
    recent: Recent,
    noted: String,
    phase: String,
}

impl Show {
    pub(crate) fn new(stage: Stage, screen: Screen, narration: Narration) -> Self {
        Self { stage, screen, narration, recent: Recent::default(), noted: String::new(), phase: String::new() }
    }

    /// Changes the displayed text.
    pub(crate) fn tell(&mut self, narration: Narration) -> anyhow::Result<()> {
        self.narration = narration;
        self.screen.note(&console::style(narration.title).bold().to_string())
    }

    /// Clears the tallies of an earlier load.
    pub(crate) fn start_anew(&mut self) {
        self.recent = Recent::default();
    }

    /// Continues for this long.
    pub(crate) async fn linger(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.look().await?;
            sleep(EVERY).await;
        }
        Ok(())
    }

    /// Continues until the condition holds; fails if a rollout fails meanwhile.
    pub(crate) async fn until(&mut self, what: &str, is_so: impl Fn(&View) -> bool) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let view = self.look().await?;
            if is_so(&view) {
                return Ok(());
            }
            if view.phase == "Failed" || begun.elapsed() > DEADLINE {
                let waited = begun.elapsed().as_secs();
                bail!("waited {waited} s until {what}; the controller says: {}: {}", view.phase, view.message);
            }
            sleep(EVERY).await;
        }
    }

    async fn look(&mut self) -> anyhow::Result<View> {
        let status = self.stage.status().await?;
        let tally = self.stage.tally();
        let view = View::new(&status, &tally, &self.recent);
        self.recent.add(&tally);
        self.note_changes(&view)?;
        self.screen.draw(&self.narration, &view)?;
        Ok(view)
    }

    /// Changes of weights and ends of rollouts stay on the screen.
    fn note_changes(&mut self, view: &View) -> anyhow::Result<()> {
        let weights: Vec<String> =
            view.rows.iter().map(|row| format!("{} {}", row.name, percent(row.weight))).collect();
        let weights = weights.join(", ");
        if weights != self.noted {
            let ready: Vec<String> =
                view.rows.iter().map(|row| format!("{}/{}", row.endpoints.ready, row.endpoints.listed)).collect();
            self.screen.note(&format!("weights: {weights} (ready {})", ready.join(", ")))?;
            self.noted = weights;
        }
        if view.phase != self.phase {
            if matches!(view.phase.as_str(), "Succeeded" | "Failed") {
                self.screen.note(&format!("{}: {}", view.phase, view.message))?;
            }
            self.phase.clone_from(&view.phase);
        }
        Ok(())
    }
}
