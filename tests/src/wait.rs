//! Waits for a condition with a deadline, instead of sleeping for a fixed time.

use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep, timeout_at};

/// How often the condition is looked at.
const EVERY: Duration = Duration::from_millis(10);

/// Calls `condition` until it returns `Ok`, and returns that; fails at the deadline, saying `what` was awaited and
/// what was seen last, which is the condition's last error.
///
/// ```
/// # use std::time::Duration; use anyhow::ensure; use tideshift_tests::wait::eventually;
/// # #[tokio::main] async fn main() -> anyhow::Result<()> {
/// let mut looks = 0;
/// eventually("three looks", Duration::from_secs(5), async || {
///     looks += 1;
///     ensure!(looks >= 3, "{looks} looks");
///     Ok(())
/// })
/// .await
/// # }
/// ```
pub async fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl AsyncFnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + deadline;
    let mut seen = "nothing: the first look did not end".to_owned();
    loop {
        match timeout_at(end, condition()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(not_yet)) => seen = format!("{not_yet:#}"),
            Err(_) => bail!("waited {deadline:?} for {what}; seen last: {seen}"),
        }
        if Instant::now() >= end {
            bail!("waited {deadline:?} for {what}; seen last: {seen}");
        }
        sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use anyhow::ensure;

    use super::*;

    #[tokio::test]
    async fn says_what_was_awaited_and_seen() {
        let error = eventually("a miracle", Duration::from_millis(30), async || {
            ensure!(false, "an ordinary day");
            Ok(())
        });
        let error = error.await.unwrap_err().to_string();
        assert!(error.contains("for a miracle; seen last: an ordinary day"), "{error}");
    }

    #[tokio::test]
    async fn a_look_that_never_ends_is_cut_at_the_deadline() {
        let look = eventually::<()>("nothing", Duration::from_millis(30), async || pending().await);
        assert!(look.await.is_err());
    }
}
