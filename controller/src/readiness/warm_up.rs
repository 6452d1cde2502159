//! Warm-up requests, which a new endpoint must answer before it counts as ready. [`crate::readiness`] decides which
//! endpoints are new, and their state meanwhile.

use crate::limits::Limit;
use crate::net::{direct_client, header_map, status_of};
use crate::readiness::probe::Subject;
use futures_util::stream::{FuturesUnordered, StreamExt};
use reqwest::{Method, redirect};
use std::time::Duration;
use tideshift_core::shift::WarmUpRequests;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

/// The interval between two progress reports of an attempt.
const SAY: Duration = Duration::from_millis(500);
/// The pause after a failed attempt; it doubles with each failure, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long a connection stays open for the next request.
const IDLE: Duration = Duration::from_secs(1);
/// The most bytes of an answer that are read; their content does not matter.
const MAX_BODY_BYTES: usize = 1 << 20;

/// The client for warm-up requests; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    limit: Limit,
}

/// The progress of an endpoint's warm-up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// For people: `warming up: 12 of 50 requests`, or why the latest attempt failed.
    pub message: String,
    /// Whether an attempt has failed.
    pub has_failed: bool,
}

impl Client {
    /// A client for any number of endpoints. It uses no proxy from the environment, follows no redirects and keeps no
    /// cookies.
    ///
    /// # Errors
    ///
    /// If the TLS library cannot be set up.
    pub fn new(limit: Limit) -> Result<Self, reqwest::Error> {
        let client = direct_client(concat!("tideshift-warm-up/", env!("CARGO_PKG_VERSION")));
        let http = client.redirect(redirect::Policy::none()).pool_idle_timeout(IDLE).build()?;
        Ok(Self { http, limit })
    }

    /// Sends warm-up requests until enough of `requests` pass in one attempt. A failed attempt is repeated after a
    /// pause, without limit. The limits are those of the document's namespace. `say` receives the progress from the
    /// start.
    pub async fn warm_up(
        &self,
        namespace: &str,
        subject: &Subject,
        requests: &WarmUpRequests,
        mut say: impl FnMut(Progress),
    ) {
        let Subject { service, version, endpoint } = subject;
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut failure: Option<String> = None;
        loop {
            let of = requests.count;
            let under_way = |done| match &failure {
                None => format!("warming up: {done} of {of} requests"),
                Some(failure) => format!("{failure}; trying again: {done} of {of}"),
            };
            let has_failed = failure.is_some();
            let say_done = |done| say(Progress { message: under_way(done), has_failed });
            let outcome = self.try_once(namespace, subject, requests, say_done);
            let Err(why) = outcome.await else { break };
            tracing::warn!(service, version, %endpoint, "{why}; next try in {} s", pause.as_secs());
            say(Progress { message: format!("{why}; next try in {} s", pause.as_secs()), has_failed: true });
            failure = Some(why);
            sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        let seconds = begun.elapsed().as_secs_f64();
        tracing::info!(service, version, %endpoint, requests = requests.count, seconds, "warmed up");
    }

    /// Sends the requests of one attempt, until all are answered or so many have failed that the attempt cannot
    /// succeed.
    async fn try_once(
        &self,
        namespace: &str,
        subject: &Subject,
        requests: &WarmUpRequests,
        mut say: impl FnMut(u32),
    ) -> Result<(), String> {
        let count = requests.count;
        let mut paths = requests.paths.iter().cycle().take(count as usize);
        let mut asked = FuturesUnordered::new();
        let mut ticks = interval_at(Instant::now() + SAY, SAY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut done, mut failed) = (0, 0);
        say(done);
        loop {
            while asked.len() < requests.concurrency as usize
                && let Some(path) = paths.next()
            {
                asked.push(self.send(namespace, subject, requests, path));
            }
            tokio::select! {
                _ = ticks.tick() => say(done),
                answer = asked.next() => {
                    let Some(answer) = answer else { return Ok(()) };
                    done += 1;
                    let Err(why) = answer else { continue };
                    failed += 1;
                    if failed > requests.failures_borne() {
                        return Err(format!("warm-up: {failed} of {count} requests failed ({why})"));
                    }
                }
            }
        }
    }

    async fn send(
        &self,
        namespace: &str,
        subject: &Subject,
        requests: &WarmUpRequests,
        path: &str,
    ) -> Result<(), String> {
        let _place = self.limit.admit(namespace).await;
        let scheme = if requests.https { "https" } else { "http" };
        let method = if requests.head { Method::HEAD } else { Method::GET };
        let request = self.http.request(method, format!("{scheme}://{}{path}", subject.endpoint));
        let request = request.headers(header_map(&requests.headers)?).timeout(requests.timeout);
        let status = status_of(request, MAX_BODY_BYTES).await?;
        match requests.passes(status) {
            true => Ok(()),
            false => Err(format!("HTTP status {status}")),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use axum::extract::{Request, State};
    use axum::http::StatusCode;
    use axum::response::{IntoResponse, Response};
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};
    use tideshift_core::shift::Endpoint;
    use tokio::net::TcpListener;
    use tokio::sync::Semaphore;

    /// An endpoint that records its requests.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct Upstream(Arc<Mutex<Behaviour>>);

    #[derive(Debug, Default)]
    pub(crate) struct Behaviour {
        pub(crate) port: u16,
        /// Method, path and host of each request, without those to `/health`.
        pub(crate) asked: Vec<String>,
        /// The statuses of the next answers; 200 when it is empty.
        pub(crate) statuses: VecDeque<u16>,
        /// The statuses of the next answers to `/health`; the last one stays.
        pub(crate) health: VecDeque<u16>,
        /// How many requests are answered; `None` for all.
        pub(crate) allowed: Option<Arc<Semaphore>>,
        open: usize,
        most_open: usize,
    }

    impl Upstream {
        pub(crate) async fn start() -> Self {
            let upstream = Self::default();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            upstream.with(|own| own.port = listener.local_addr().unwrap().port());
            let router = axum::Router::new().fallback(answer).with_state(upstream.clone());
            tokio::spawn(async move { axum::serve(listener, router).await });
            upstream
        }

        /// The same, without answers before [`Self::allow`].
        pub(crate) async fn start_held() -> Self {
            let upstream = Self::start().await;
            upstream.with(|own| own.allowed = Some(Arc::new(Semaphore::new(0))));
            upstream
        }

        pub(crate) fn allow(&self, requests: usize) {
            self.with(|own| own.allowed.as_ref().unwrap().add_permits(requests));
        }

        pub(crate) fn with<T>(&self, change: impl FnOnce(&mut Behaviour) -> T) -> T {
            change(&mut self.0.lock().unwrap())
        }

        pub(crate) fn port(&self) -> u16 {
            self.with(|own| own.port)
        }

        pub(crate) fn asked(&self) -> usize {
            self.with(|own| own.asked.len())
        }
    }

    async fn answer(State(upstream): State<Upstream>, request: Request) -> Response {
        if request.uri().path() == "/health" {
            let next = |own: &mut Behaviour| match own.health.len() {
                2.. => own.health.pop_front(),
                _ => own.health.front().copied(),
            };
            return StatusCode::from_u16(upstream.with(next).unwrap_or(200)).unwrap().into_response();
        }
        let (head, _) = request.into_parts();
        let header = |name| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let allowed = upstream.with(|own| {
            own.asked.push(format!("{} {} {} {}", head.method, head.uri, header("host"), header("x-a")));
            own.open += 1;
            own.most_open = own.most_open.max(own.open);
            own.allowed.clone()
        });
        if let Some(allowed) = allowed {
            allowed.acquire().await.unwrap().forget();
        }
        let status = upstream.with(|own| {
            own.open -= 1;
            own.statuses.pop_front().unwrap_or(200)
        });
        (StatusCode::from_u16(status).unwrap(), [("location", "/elsewhere")], "so it is").into_response()
    }

    fn subject(port: u16) -> Subject {
        let endpoint = Endpoint { host: "127.0.0.1".to_owned(), port };
        Subject { service: "shop".to_owned(), version: "v2".to_owned(), endpoint }
    }

    fn client() -> Client {
        Client::new(Limit::new(100, 0, 0)).unwrap()
    }

    async fn once(upstream: &Upstream, requests: &WarmUpRequests) -> Result<(), String> {
        client().try_once("", &subject(upstream.port()), requests, |_| {}).await
    }

    #[tokio::test]
    async fn the_paths_are_taken_in_turn_with_the_headers_that_were_given() {
        let upstream = Upstream::start().await;
        let headers = [("Host", "shop.example.com"), ("X-A", "1")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let paths = vec!["/".to_owned(), "/cart?warm=1".to_owned()];
        let requests = WarmUpRequests { count: 3, paths, headers, ..WarmUpRequests::default() };
        assert_eq!(once(&upstream, &requests).await, Ok(()));
        let expected = ["/", "/cart?warm=1", "/"].map(|path| format!("GET {path} shop.example.com 1"));
        assert_eq!(upstream.with(|own| own.asked.clone()), expected);
        let head = WarmUpRequests { count: 1, head: true, ..WarmUpRequests::default() };
        assert_eq!(once(&upstream, &head).await, Ok(()));
        let expected = format!("HEAD / 127.0.0.1:{} ", upstream.port());
        assert_eq!(upstream.with(|own| own.asked.pop()), Some(expected));
    }

    #[tokio::test]
    async fn so_many_are_under_way_at_a_time_and_no_more() {
        let upstream = Upstream::start_held().await;
        let requests = WarmUpRequests { count: 12, concurrency: 5, ..WarmUpRequests::default() };
        let asking = tokio::spawn({
            let upstream = upstream.clone();
            async move { once(&upstream, &requests).await }
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while upstream.asked() < 5 {
            assert!(Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
        upstream.allow(12);
        assert_eq!(asking.await.unwrap(), Ok(()));
        assert_eq!((upstream.asked(), upstream.with(|own| own.most_open)), (12, 5));
    }

    #[tokio::test]
    async fn a_try_ends_once_it_cannot_pass_any_more() {
        let upstream = Upstream::start().await;
        let requests = WarmUpRequests { min_pass_percent: 80, ..WarmUpRequests::default() };
        upstream.with(|own| own.statuses = [503, 503].into());
        assert_eq!(once(&upstream, &requests).await, Ok(()));
        assert_eq!(upstream.asked(), 10);
        upstream.with(|own| own.statuses = [503, 200, 503, 200, 500].into());
        let failed = "warm-up: 3 of 10 requests failed (HTTP status 500)";
        assert_eq!(once(&upstream, &requests).await, Err(failed.to_owned()));
        assert_eq!(upstream.asked(), 15);
    }

    #[tokio::test]
    async fn what_passes_is_up_to_the_document_and_redirects_are_not_followed() {
        let upstream = Upstream::start().await;
        let one = WarmUpRequests { count: 1, ..WarmUpRequests::default() };
        upstream.with(|own| own.statuses = [302, 404, 404].into());
        assert_eq!(once(&upstream, &one).await, Ok(()));
        let not_found = Err("warm-up: 1 of 1 requests failed (HTTP status 404)".to_owned());
        assert_eq!(once(&upstream, &one).await, not_found);
        assert_eq!(once(&upstream, &WarmUpRequests { status_codes: vec![404..=404], ..one }).await, Ok(()));
        assert_eq!(upstream.asked(), 3);
    }

    #[tokio::test]
    async fn a_request_that_is_not_answered_in_time_has_failed() {
        let upstream = Upstream::start_held().await;
        let timeout = Duration::from_millis(50);
        let result = once(&upstream, &WarmUpRequests { timeout, ..WarmUpRequests::default() }).await;
        assert_eq!(result, Err("warm-up: 1 of 10 requests failed (no answer in time)".to_owned()));
    }

    #[tokio::test]
    async fn it_is_tried_again_and_said_how_it_goes() {
        let upstream = Upstream::start().await;
        upstream.with(|own| own.statuses = [200, 503].into());
        let mut said = Vec::new();
        let requests = WarmUpRequests { count: 3, ..WarmUpRequests::default() };
        client().warm_up("", &subject(upstream.port()), &requests, |progress| said.push(progress)).await;
        assert_eq!(upstream.asked(), 2 + 3);
        let failed = "warm-up: 1 of 3 requests failed (HTTP status 503)";
        let said: Vec<_> = said.iter().map(|progress| (progress.message.as_str(), progress.has_failed)).collect();
        assert_eq!(said.iter().filter(|(message, _)| *message == format!("{failed}; next try in 1 s")).count(), 1);
        assert_eq!(said.first(), Some(&("warming up: 0 of 3 requests", false)));
        assert!(
            said.last().is_some_and(|(message, has_failed)| message.starts_with(failed) && *has_failed),
            "{said:?}"
        );
    }
}
