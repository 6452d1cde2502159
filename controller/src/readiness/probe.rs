//! One probe of one endpoint: whether it can take traffic now. The probes are Kubernetes' probes with the same
//! semantics. [`crate::readiness`] decides when to probe; [`threshold`] evaluates consecutive results.

mod exec;
mod grpc;
mod http;
pub mod threshold;

use crate::net::io_reason;
use std::time::Duration;
use tideshift_core::shift::Endpoint;
use tideshift_core::shift::probe::{Check, Probe};
use tokio::net::TcpStream;

pub use http::Client;

/// The endpoint to probe, with its service and version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject {
    /// The service's name.
    pub service: String,
    /// The version's name.
    pub version: String,
    /// The endpoint's address.
    pub endpoint: Endpoint,
}

/// Probes once, within the probe's timeout.
///
/// # Errors
///
/// Why the endpoint cannot take traffic, in a few words such as `connection refused` or `HTTP status 503`.
pub async fn once(client: &Client, subject: &Subject, probe: &Probe) -> Result<(), String> {
    let check = async {
        match &probe.check {
            Check::HttpGet(get) => client.get(&subject.endpoint, get).await,
            Check::TcpSocket { host, port } => {
                let host = host.as_deref().unwrap_or(&subject.endpoint.host);
                connect(host, port.unwrap_or(subject.endpoint.port)).await
            }
            Check::Exec { command } => exec::run(command, subject).await,
            Check::Grpc { port, service } => {
                let Endpoint { host, port: own } = subject.endpoint.clone();
                grpc::check(&Endpoint { host, port: port.unwrap_or(own) }, service).await
            }
        }
    };
    let timely = tokio::time::timeout(probe.timeout, check).await;
    timely.unwrap_or_else(|_| Err(format!("no result within {}", shown(probe.timeout))))
}

/// Succeeds if a TCP connection opens, and closes it at once.
async fn connect(host: &str, port: u16) -> Result<(), String> {
    TcpStream::connect((host, port)).await.map(|_| ()).map_err(|error| io_reason(&error))
}

/// A duration for people: `1 s`, `250 ms`.
fn shown(duration: Duration) -> String {
    match duration.subsec_millis() {
        0 => format!("{} s", duration.as_secs()),
        _ => format!("{} ms", duration.as_millis()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
    use tideshift_core::shift::probe::HttpGet;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn subject(port: u16) -> Subject {
        let endpoint = Endpoint { host: "127.0.0.1".to_owned(), port };
        Subject { service: "checkout".to_owned(), version: "v2".to_owned(), endpoint }
    }

    fn probe(check: Check) -> Probe {
        Probe {
            check,
            initial_delay: Duration::ZERO,
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(5),
            success_threshold: 1,
            failure_threshold: 3,
        }
    }

    fn get() -> HttpGet {
        HttpGet { path: "/health?deep=1".to_owned(), host: None, port: None, https: false, headers: Vec::new() }
    }

    /// A server that answers its connections one after the other with these texts. Returns its port and the received
    /// requests.
    async fn server(answers: Vec<String>) -> (u16, tokio::task::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            let mut requests = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(stream.read_u8().await.unwrap());
                }
                requests.push(String::from_utf8(request).unwrap());
                stream.write_all(answer.replace("PORT", &port.to_string()).as_bytes()).await.unwrap();
            }
            requests
        });
        (port, task)
    }

    /// A dropped listener stays open for a moment in a command that another test is about to start.
    async fn until_refused(port: u16) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            assert!(Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
    }

    async fn http(get: HttpGet, answers: &[&str]) -> (Result<(), String>, Vec<String>) {
        let (port, task) = server(answers.iter().map(|answer| format!("HTTP/1.1 {answer}\r\n\r\n")).collect()).await;
        let result = once(&Client::new().unwrap(), &subject(port), &probe(Check::HttpGet(get))).await;
        (result, task.await.unwrap())
    }

    #[tokio::test]
    async fn an_http_answer_counts_by_its_status() {
        const EMPTY: &str = "x\r\ncontent-length: 0";
        for (status, expected) in [
            ("200", Ok(())),
            ("204", Ok(())),
            ("304", Ok(())),
            ("399", Ok(())),
            ("400", Err("HTTP status 400".to_owned())),
            ("503", Err("HTTP status 503".to_owned())),
        ] {
            assert_eq!(http(get(), &[&format!("{status} {EMPTY}")]).await.0, expected);
        }
    }

    #[tokio::test]
    async fn an_http_probe_says_who_it_is_and_what_it_was_told_to_say() {
        let headers = [("Host", "shop.example.com"), ("X-A", "1"), ("X-A", "2")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let (result, requests) = http(HttpGet { headers, ..get() }, &["200 OK\r\ncontent-length: 0"]).await;
        assert_eq!(result, Ok(()));
        let request = requests[0].to_lowercase();
        assert!(request.starts_with("get /health?deep=1 http/1.1\r\n"), "{request}");
        let agent = format!("user-agent: tideshift-probe/{}", env!("CARGO_PKG_VERSION"));
        for line in ["host: shop.example.com", "x-a: 1", "x-a: 2", "connection: close", &agent] {
            assert_eq!(request.lines().filter(|l| *l == line).count(), 1, "{line} in {request}");
        }
        assert_eq!(request.matches("host:").count(), 1);
    }

    #[tokio::test]
    async fn redirects_are_followed_on_the_same_host_only() {
        let here = "302 Found\r\nlocation: http://127.0.0.1:PORT/real\r\ncontent-length: 0";
        let elsewhere = "302 Found\r\nlocation: http://unreachable.invalid/\r\ncontent-length: 0";
        let (result, requests) = http(get(), &[here, "500 x\r\ncontent-length: 0"]).await;
        assert_eq!(result, Err("HTTP status 500".to_owned()));
        assert!(requests[1].starts_with("GET /real "));
        assert_eq!(http(get(), &[elsewhere]).await.0, Ok(()));
        let (result, _) = http(get(), &[here; 11]).await;
        assert_eq!(result, Err("more than 10 redirects".to_owned()));
    }

    #[tokio::test]
    async fn answers_that_break_off_or_never_end_are_told_apart() {
        let (result, _) = http(get(), &["200 OK\r\ncontent-length: 10"]).await;
        assert!(result.is_err(), "{result:?}");
        let endless = format!("200 OK\r\ncontent-length: 1000000\r\n\r\n{}", "x".repeat(20 << 10));
        assert_eq!(http(get(), &[&endless]).await.0, Ok(()));
        let (result, _) = http(get(), &["not HTTP"]).await;
        assert!(result.is_err(), "{result:?}");
    }

    #[tokio::test]
    async fn a_closed_port_refuses() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = subject(listener.local_addr().unwrap().port());
        let client = Client::new().unwrap();
        let tcp = probe(Check::TcpSocket { host: None, port: None });
        assert_eq!(once(&client, &open, &tcp).await, Ok(()));
        drop(listener);
        until_refused(open.endpoint.port).await;
        let refused = Err("connection refused".to_owned());
        assert_eq!(once(&client, &open, &tcp).await, refused);
        assert_eq!(once(&client, &open, &probe(Check::HttpGet(get()))).await, refused);
    }

    #[tokio::test]
    async fn a_silent_endpoint_times_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = subject(listener.local_addr().unwrap().port());
        let probe = Probe { timeout: Duration::from_millis(50), ..probe(Check::HttpGet(get())) };
        let result = once(&Client::new().unwrap(), &silent, &probe).await;
        assert_eq!(result, Err("no result within 50 ms".to_owned()));
    }

    async fn grpc(port: u16, service: &str, timeout: Duration) -> Result<(), String> {
        let check = Check::Grpc { port: Some(port), service: service.to_owned() };
        // Nothing listens on the endpoint's own port.
        once(&Client::new().unwrap(), &subject(1), &Probe { timeout, ..probe(check) }).await
    }

    #[tokio::test]
    async fn a_grpc_server_counts_by_what_it_says_of_its_health() {
        use tonic_health::ServingStatus;
        const LONG: Duration = Duration::from_secs(30);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("shop.Cart", ServingStatus::NotServing).await;
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let server =
            tokio::spawn(tonic::transport::Server::builder().add_service(health).serve_with_incoming(incoming));
        assert_eq!(grpc(port, "", LONG).await, Ok(()));
        assert_eq!(grpc(port, "shop.Cart", LONG).await, Err("gRPC health NOT_SERVING".to_owned()));
        assert_eq!(grpc(port, "shop.Till", LONG).await, Err("gRPC status 5 (NotFound)".to_owned()));
        reporter.set_service_status("shop.Cart", ServingStatus::Serving).await;
        assert_eq!(grpc(port, "shop.Cart", LONG).await, Ok(()));
        server.abort();
        assert!(server.await.is_err_and(|error| error.is_cancelled()));
        until_refused(port).await;
        assert_eq!(grpc(port, "", LONG).await, Err("connection refused".to_owned()));
    }

    #[tokio::test]
    async fn a_server_that_speaks_no_grpc_fails_its_probe() {
        let answer = "HTTP/1.1 400 x\r\ncontent-length: 0\r\n\r\n".to_owned();
        let (port, _task) = server(vec![answer; 9]).await;
        let result = grpc(port, "", Duration::from_secs(30)).await;
        assert!(result.as_ref().is_err_and(|why| why.starts_with("no gRPC answer: ")), "{result:?}");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = listener.local_addr().unwrap().port();
        let result = grpc(silent, "", Duration::from_millis(50)).await;
        assert_eq!(result, Err("no result within 50 ms".to_owned()));
    }

    async fn exec(command: &[&str], timeout: Duration) -> Result<(), String> {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let probe = Probe { timeout, ..probe(Check::Exec { command }) };
        once(&Client::new().unwrap(), &subject(9002), &probe).await
    }

    #[tokio::test]
    async fn a_command_counts_by_how_it_ends() {
        const LONG: Duration = Duration::from_secs(30);
        let env = "test \"$TIDESHIFT_SERVICE $TIDESHIFT_VERSION $TIDESHIFT_ENDPOINT\" = 'checkout v2 127.0.0.1:9002'";
        assert_eq!(exec(&["sh", "-c", env], LONG).await, Ok(()));
        assert_eq!(exec(&["sh", "-c", "exit 3"], LONG).await, Err("sh ended with exit status: 3".to_owned()));
        assert_eq!(exec(&["cat"], LONG).await, Ok(()));
        let absent = exec(&["/absent/probe"], LONG).await;
        assert_eq!(absent, Err("/absent/probe cannot be run: no such file or directory".to_owned()));
    }

    #[tokio::test]
    async fn a_command_that_takes_too_long_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("held-open");
        // The grandchild holds the pipe open; reading it to its end shows that all processes are gone.
        let script = format!("mkfifo {0}; sleep 600 >{0} & wait", pipe.display());
        let probing = tokio::spawn(async move { exec(&["sh", "-c", &script], Duration::from_secs(1)).await });
        let deadline = Instant::now() + Duration::from_secs(20);
        while !pipe.exists() {
            assert!(Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
        let end = tokio::fs::read(pipe);
        let end = tokio::time::timeout(Duration::from_secs(20), end).await.unwrap();
        assert_eq!(end.unwrap(), b"");
        assert_eq!(probing.await.unwrap(), Err("no result within 1 s".to_owned()));
    }
}
