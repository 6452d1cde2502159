//! Authentication: bearer tokens from files, client certificates of proxies, or, without either, only clients on this
//! machine.
//!
//! A token is compared by SHA-256 in constant time with every configured token, so that the response time reveals
//! nothing about them. Without tokens a web page in the user's browser must not be able to send requests: they are
//! detected by `Origin`, and by the host name they use for this server, in case of DNS rebinding.

use super::caller::{Caller, Certificate, Sees, SpeaksFor, read_name};
use super::{ApiError, Ticket};
use crate::api::forward;
use crate::kubernetes::TokenReviewer;
use crate::net::io_reason;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use tokio::time::timeout;

/// Shorter tokens could be guessed.
const SHORTEST_TOKEN: usize = 16;
/// The longest token.
const LONGEST_TOKEN: usize = 512;

/// The access that a token grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Read-only access.
    Read,
    /// All user actions, reading included.
    Operate,
    /// Policies and reports.
    Proxy,
}

impl Scope {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Proxy => "proxy",
        }
    }

    fn flag(self) -> &'static str {
        match self {
            Self::Read => "--read-token-file",
            Self::Operate => "--operate-token-file",
            Self::Proxy => "--proxy-token-file",
        }
    }
}

/// Files of bearer tokens: one per line, optionally preceded by the name of its owner. Every token in a file is valid,
/// so that tokens can be rotated one after the other.
#[derive(Debug, Clone, Default)]
pub struct TokenFiles {
    /// Read-only tokens.
    pub read: Option<PathBuf>,
    /// Tokens for all user actions.
    pub operate: Option<PathBuf>,
    /// Tokens for proxies.
    pub proxy: Option<PathBuf>,
}

/// The hashes of all tokens. Empty: no token is needed.
#[derive(Clone, Default)]
pub struct Tokens {
    tokens: Vec<Token>,
    /// The services visible to proxies that do not authenticate with a token from a file.
    sees: BTreeMap<Arc<str>, Arc<Sees>>,
}

#[derive(Clone)]
struct Token {
    scope: Scope,
    hash: [u8; 32],
    caller: Caller,
}

/// Why tokens cannot be used; never contains the tokens.
#[derive(Debug, thiserror::Error)]
#[error("{flag} {}: {why}", path.display())]
pub struct TokenError {
    flag: &'static str,
    path: PathBuf,
    why: String,
}

impl TokenFiles {
    fn given(&self) -> impl Iterator<Item = (Scope, &PathBuf)> {
        let all = [(Scope::Read, &self.read), (Scope::Operate, &self.operate), (Scope::Proxy, &self.proxy)];
        all.into_iter().filter_map(|(scope, path)| Some((scope, path.as_ref()?)))
    }

    /// The files, to watch them for changes.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.given().map(|(_, path)| path.clone()).collect()
    }

    /// Names the roles without tokens while other roles have some; empty if the configuration is complete.
    /// `certificates`: proxies may authenticate with certificates.
    pub fn left_out(&self, certificates: bool) -> &'static str {
        match (self.read.is_some() || self.operate.is_some(), self.proxy.is_some() || certificates) {
            (true, false) => "proxies are refused: there is no --proxy-token-file",
            (false, true) => "people are refused: there is no --read-token-file and no --operate-token-file",
            _ => "",
        }
    }

    /// Loads the files.
    ///
    /// # Errors
    ///
    /// For the first file that cannot be read, contains no token, or contains one that is too short, too long or has
    /// characters other than visible ASCII.
    pub fn load(&self) -> Result<Tokens, TokenError> {
        let mut tokens = Tokens::default();
        for (scope, path) in self.given() {
            let found = read(path, scope).map_err(|why| TokenError { flag: scope.flag(), path: path.clone(), why })?;
            for line in found {
                match line {
                    Line::Token(hash, caller) => {
                        tokens.tokens.push(Token { scope, hash, caller: caller.in_scope(scope) });
                    }
                    Line::Sees(name, sees) => drop(tokens.sees.insert(name, sees)),
                }
            }
        }
        Ok(tokens)
    }
}

/// A line of a token file.
enum Line {
    /// The hash of a token, and its owner.
    Token([u8; 32], Caller),
    /// The services visible to a proxy that authenticates by other means.
    Sees(Arc<str>, Arc<Sees>),
}

/// Stands for the token of a proxy that authenticates by other means.
const NO_TOKEN: &str = "-";

fn read(path: &Path, scope: Scope) -> Result<Vec<Line>, String> {
    let text = fs::read_to_string(path).map_err(|error: io::Error| format!("cannot be read: {}", io_reason(&error)))?;
    let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.trim())).filter(|(_, line)| !line.is_empty());
    let tokens = lines.map(|(number, line)| read_line(line, scope).map_err(|why| format!("line {number}: {why}")));
    let tokens: Vec<_> = tokens.collect::<Result<_, _>>()?;
    match tokens.is_empty() {
        true => Err("no token in it; expected one on a line".to_owned()),
        false => Ok(tokens),
    }
}

/// Parses `TOKEN`, `NAME TOKEN`, or for proxies `NAME TOKEN SERVICES` and `NAME - SERVICES`. Errors never contain the
/// token.
fn read_line(line: &str, scope: Scope) -> Result<Line, String> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let (name, token, services) = match (words.as_slice(), scope) {
        ([token], _) => (None, token, None),
        ([name, token], _) => (Some(name), token, None),
        ([name, NO_TOKEN, services], Scope::Proxy) => {
            return Ok(Line::Sees(read_name(name)?, Arc::new(Sees::read(services)?)));
        }
        ([name, token, services], Scope::Proxy) => (Some(name), token, Some(services)),
        (_, Scope::Proxy) => {
            return Err("expected TOKEN, NAME TOKEN, NAME TOKEN SERVICES or NAME - SERVICES".to_owned());
        }
        _ => return Err("expected TOKEN or NAME TOKEN".to_owned()),
    };
    if !(SHORTEST_TOKEN..=LONGEST_TOKEN).contains(&token.len()) || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!("a token is {SHORTEST_TOKEN} to {LONGEST_TOKEN} visible ASCII characters"));
    }
    let name = name.map(|name| read_name(name)).transpose()?;
    let sees = services.map(|services| Sees::read(services)).transpose()?.unwrap_or_default();
    Ok(Line::Token(hash(token.as_bytes()), Caller { name, sees: Arc::new(sees), ..Caller::default() }))
}

fn hash(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

impl Tokens {
    /// Whether requests need a token.
    pub fn are_needed(&self) -> bool {
        !self.tokens.is_empty() || !self.sees.is_empty()
    }

    /// The services visible to a proxy of this name, if a line names them.
    fn sees(&self, name: &str) -> Option<Arc<Sees>> {
        self.sees.get(name).cloned()
    }

    /// Whether there are proxy tokens without a name, which may speak for every proxy.
    pub fn has_nameless_proxies(&self) -> bool {
        self.tokens.iter().any(|token| token.scope == Scope::Proxy && token.caller.name.is_none())
    }

    /// The scopes of a token and its owner; empty if the token is unknown.
    fn find(&self, token: &[u8]) -> Vec<(Scope, &Caller)> {
        let presented = hash(token);
        let matches = self.tokens.iter().map(|token| (token, bool::from(token.hash.ct_eq(&presented))));
        // Evaluates all of them first, regardless of matches.
        let matches: Vec<_> = matches.collect();
        matches.into_iter().filter(|(_, is_it)| *is_it).map(|(token, _)| (token.scope, &token.caller)).collect()
    }
}

impl Caller {
    /// A named credential in the proxy scope speaks only for the proxy of that name.
    fn in_scope(self, scope: Scope) -> Self {
        match (&self.name, scope) {
            (Some(name), Scope::Proxy) => Self { speaks_for: SpeaksFor::One(name.clone()), ..self },
            _ => self,
        }
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({})", self.tokens.len())
    }
}

/// The authentication of one route.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) tokens: watch::Receiver<Tokens>,
    /// The scopes that grant access; empty: no token needed.
    pub(super) allowed: &'static [Scope],
    /// Reviews further tokens of proxies.
    pub(super) reviewer: Option<Arc<TokenReviewer>>,
    /// Whether proxies may authenticate with client certificates.
    pub(super) certificates: bool,
    /// Whether the route changes state.
    pub(super) changes: bool,
    /// The timeout of a request.
    pub(super) patience: Option<Duration>,
}

/// Authorises a request or rejects it, before reading any of its body.
pub(super) async fn guard(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip());
    let known = match guard.certified(request.headers(), request.extensions().get()) {
        Some(certified) => Some(certified),
        None => guard.review(request.headers(), peer).await,
    };
    let caller = match guard.admit(request.headers(), known) {
        Ok(caller) => caller,
        Err(refusal) => return refusal.into_response(),
    };
    if let Some(ticket) = request.extensions().get::<Arc<Ticket>>().filter(|_| !guard.allowed.is_empty()) {
        ticket.trust(caller.name());
    }
    request.extensions_mut().insert(caller);
    match guard.patience {
        None => next.run(request).await,
        Some(patience) => timeout(patience, next.run(request)).await.unwrap_or_else(|_| {
            let why = format!("it took longer than {} s", patience.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, why).into_response()
        }),
    }
}

impl Guard {
    /// The proxy that a certificate identifies. A token takes precedence.
    fn certified(&self, headers: &HeaderMap, certificate: Option<&Certificate>) -> Option<Caller> {
        let certificate = certificate.filter(|_| self.certificates && self.allowed.contains(&Scope::Proxy))?;
        if headers.contains_key(header::AUTHORIZATION) {
            return None;
        }
        let tokens = self.tokens.borrow();
        forward::certificate(certificate, headers).caller(|name| tokens.sees(name))
    }

    /// The proxy that a token identifies according to the cluster.
    async fn review(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Option<Caller> {
        let reviewer = self.reviewer.as_ref().filter(|_| self.allowed.contains(&Scope::Proxy))?;
        let token = bearer(headers)?;
        // A configured token is not reviewed.
        if !self.tokens.borrow().find(token).is_empty() {
            return None;
        }
        let proxy = reviewer.review(token, peer).await?;
        let speaks_for = proxy.pod.as_ref().map_or(SpeaksFor::All, |(namespace, name)| SpeaksFor::Pod {
            namespace: namespace.as_str().into(),
            name: name.as_str().into(),
        });
        let sees = {
            let tokens = self.tokens.borrow();
            let pod = proxy.pod.as_ref().map(|(namespace, name)| format!("{namespace}/{name}"));
            pod.and_then(|pod| tokens.sees(&pod)).or_else(|| tokens.sees(&proxy.user)).unwrap_or_default()
        };
        // All pods of a Deployment have the same user.
        let name = match &speaks_for {
            SpeaksFor::Pod { namespace, name } => format!("pod {namespace}/{name}"),
            _ => proxy.user,
        };
        Some(Caller { name: Some(name.into()), speaks_for, sees })
    }

    fn admit(&self, headers: &HeaderMap, known: Option<Caller>) -> Result<Caller, ApiError> {
        if self.allowed.is_empty() {
            return Ok(Caller::default());
        }
        let tokens = self.tokens.borrow();
        let caller = match (tokens.are_needed() || self.reviewer.is_some() || self.certificates, known) {
            (true, Some(known)) => known,
            (true, None) => self.authorize(&tokens, headers)?,
            (false, _) => {
                from_this_machine(headers)?;
                Caller::default()
            }
        };
        // Pages of other origins can send forms and plain text without a preflight request.
        if self.changes && !is_json(headers) {
            let why = "content-type: application/json is needed here, also where there is no body";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
        }
        Ok(caller)
    }

    fn authorize(&self, tokens: &Tokens, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let found = bearer(headers).map(|token| tokens.find(token));
        let found = match found.as_deref() {
            None => {
                let why = "a token is needed here: `authorization: Bearer TOKEN`";
                return Err(ApiError::new(StatusCode::UNAUTHORIZED, why).with_challenge(""));
            }
            Some([]) => {
                let attributes = r#", error="invalid_token""#;
                return Err(ApiError::new(StatusCode::UNAUTHORIZED, "no such token").with_challenge(attributes));
            }
            Some(found) => found,
        };
        if let Some((_, caller)) = found.iter().find(|(scope, _)| self.allowed.contains(scope)) {
            return Ok((*caller).clone());
        }
        let names: Vec<_> = self.allowed.iter().map(|scope| scope.name()).collect();
        let why = format!("a token for {} is needed here; this one is for {}", names.join(" or "), found[0].0.name());
        let attributes = format!(r#", error="insufficient_scope", scope="{}""#, names.join(" "));
        Err(ApiError::new(StatusCode::FORBIDDEN, why).with_challenge(&attributes))
    }
}

/// The token from `authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

/// Rejects requests that a browser sends for a page of another origin.
fn from_this_machine(headers: &HeaderMap) -> Result<(), ApiError> {
    // Every browser sends a host.
    let Some(host) = headers.get(header::HOST) else { return Ok(()) };
    let host = host.to_str().unwrap_or_default();
    if !is_of_this_machine(host) {
        let why = format!(
            "host {host:?} is not allowed: without tokens expected a loopback address, localhost or a name without \
             dots (such as the authority that proxies call); `tideshift serve --operate-token-file` lifts this"
        );
        return Err(ApiError::new(StatusCode::FORBIDDEN, why));
    }
    let of_others = || ApiError::new(StatusCode::FORBIDDEN, "pages of other origins may not ask without a token");
    // Browsers send no origin with a GET that a page only embeds, such as an image.
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    if site.is_some_and(|site| site != b"same-origin" && site != b"none") {
        return Err(of_others());
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or_default();
    let is_ours = ["http://", "https://"].iter().any(|scheme| origin.strip_prefix(scheme) == Some(host));
    match is_ours {
        true => Ok(()),
        false => Err(of_others()),
    }
}

/// Whether this host name cannot result from DNS rebinding.
fn is_of_this_machine(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host().to_ascii_lowercase();
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(&name);
    match address.parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => name.ends_with(".localhost") || !name.is_empty() && !name.contains('.'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: &str = "read-read-read-read";
    const OPERATE: &str = "operate-operate-1";
    const PROXY: &str = "proxy-proxy-proxy-proxy";

    fn files(texts: [Option<&str>; 3]) -> (tempfile::TempDir, TokenFiles) {
        let dir = tempfile::tempdir().unwrap();
        let [read, operate, proxy] = [0, 1, 2].map(|i| {
            let path = dir.path().join(i.to_string());
            texts[i].map(|text| fs::write(&path, text).unwrap())?;
            Some(path)
        });
        (dir, TokenFiles { read, operate, proxy })
    }

    fn tokens() -> Tokens {
        files([Some(READ), Some(&format!("\n {OPERATE} \r\noperate-operate-2\n")), Some(PROXY)]).1.load().unwrap()
    }

    fn headers(of: &[(&'static str, &str)]) -> HeaderMap {
        of.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    /// The status and challenge of a rejected request.
    fn refusal(
        tokens: &Tokens,
        allowed: &'static [Scope],
        changes: bool,
        of: &[(&'static str, &str)],
    ) -> (u16, String) {
        let (_, tokens) = watch::channel(tokens.clone());
        let guard = Guard { tokens, allowed, reviewer: None, certificates: false, changes, patience: None };
        let Err(problem) = guard.admit(&headers(of), None) else { return (200, String::new()) };
        let response = problem.into_response();
        let challenge = response.headers().get(header::WWW_AUTHENTICATE);
        (response.status().as_u16(), challenge.map_or_else(String::new, |value| value.to_str().unwrap().to_owned()))
    }

    #[test]
    fn a_token_is_good_for_its_scope_only() {
        use super::super::{EVERYBODY, PROXIES, PROXIES_AND_OPERATORS, READERS};
        let tokens = tokens();
        let routes = [READERS, &[Scope::Operate], PROXIES, PROXIES_AND_OPERATORS, EVERYBODY];
        let statuses = |token: &str| {
            let authorization = format!("Bearer {token}");
            routes.map(|allowed| refusal(&tokens, allowed, false, &[("authorization", &authorization)]).0)
        };
        assert_eq!(statuses(READ), [200, 403, 403, 403, 200]);
        assert_eq!(statuses(OPERATE), [200, 200, 403, 200, 200]);
        assert_eq!(statuses("operate-operate-2"), [200, 200, 403, 200, 200], "each line is a token");
        assert_eq!(statuses(PROXY), [403, 403, 200, 200, 200]);
        for stranger in ["", "read-read-read-rea", "read-read-read-readx"] {
            assert_eq!(statuses(stranger), [401, 401, 401, 401, 200], "{stranger}");
        }
        let none = routes.map(|allowed| refusal(&tokens, allowed, false, &[("host", "127.0.0.1")]).0);
        assert_eq!(none, [401, 401, 401, 401, 200]);
    }

    #[test]
    fn a_line_may_say_whose_a_token_is_and_what_it_may_see() {
        let proxies = format!("{PROXY}\nedge-1 0123456789abcdef\nedge-2  fedcba9876543210 shop/*,cart\n");
        let files = files([None, Some(&format!("alice {OPERATE}")), Some(&proxies)]);
        let tokens = files.1.load().unwrap();
        let caller = |token: &str| tokens.find(token.as_bytes())[0].1.clone();
        assert_eq!(caller(OPERATE).name(), Some("alice"));
        assert!(caller(OPERATE).may_speak_for("any").is_ok() && caller(PROXY).may_speak_for("any").is_ok());
        let (one, two) = (caller("0123456789abcdef"), caller("fedcba9876543210"));
        assert!(one.may_speak_for("edge-1").is_ok() && one.may_speak_for("edge-2").is_err());
        assert!(one.sees.is_all() && two.sees.includes("cart") && !two.sees.includes("other"));
        assert!(tokens.has_nameless_proxies());
    }

    #[test]
    fn a_certificate_is_good_for_what_proxies_do_and_for_its_own_names() {
        use super::super::{OPERATORS, PROXIES, PROXIES_AND_OPERATORS, READERS};
        let files = files([None, None, Some("edge-1 - shop/*\nsystem:serviceaccount:shop:edge - shop/cart\n")]);
        let tokens = files.1.load().unwrap();
        assert!(tokens.are_needed() && !tokens.has_nameless_proxies());
        let edge = Certificate::proxy(["edge-1".to_owned(), "spiffe://a/edge".to_owned(), "no name".to_owned()]);
        let known = |allowed, certificates, certificate: &Certificate, of: &[(&'static str, &str)]| {
            let (_, tokens) = watch::channel(tokens.clone());
            let guard = Guard { tokens, allowed, reviewer: None, certificates, changes: false, patience: None };
            guard.certified(&headers(of), Some(certificate))
        };
        let caller = known(PROXIES, true, &edge, &[]).unwrap();
        assert_eq!(caller.name(), Some("edge-1"));
        assert!(caller.may_speak_for("edge-1").is_ok() && caller.may_speak_for("spiffe://a/edge").is_ok());
        let why = caller.may_speak_for("edge-2").unwrap_err();
        assert!(why.contains("edge-1 or spiffe://a/edge"), "{why}");
        assert!(caller.sees.includes("cart.shop") && !caller.sees.includes("cart.bank"));
        let other = Certificate::proxy(["edge-2".to_owned()]);
        assert!(known(PROXIES_AND_OPERATORS, true, &other, &[]).unwrap().sees.is_all());
        for (allowed, certificates) in [(READERS, true), (OPERATORS, true), (PROXIES, false)] {
            assert_eq!(known(allowed, certificates, &edge, &[]), None);
        }
        assert_eq!(known(PROXIES, true, &edge, &[("authorization", "Bearer x")]), None, "a token goes before");
        assert_eq!(known(PROXIES, true, &Certificate::proxy([]), &[]), None, "it has no name");
        // Only another replica may name the client whose request it forwards.
        let handed_on = [("x-tideshift-handed-on", "1"), ("x-tideshift-handed-on-name", "edge-9")];
        let name = |certificate: &Certificate, of: &[(&'static str, &str)]| {
            known(PROXIES, true, certificate, of).and_then(|caller| caller.name().map(str::to_owned))
        };
        assert_eq!(name(&edge, &handed_on).as_deref(), Some("edge-1"));
        assert_eq!(name(&Certificate::Replica, &handed_on).as_deref(), Some("edge-9"));
        assert_eq!(name(&Certificate::Replica, &[]), None);
    }

    #[test]
    fn a_refusal_says_what_is_needed() {
        let tokens = tokens();
        let challenge = |of: &[(&'static str, &str)]| refusal(&tokens, &[Scope::Operate], false, of).1;
        assert_eq!(challenge(&[]), r#"Bearer realm="tideshift""#);
        assert_eq!(challenge(&[("authorization", "Basic dTpw")]), r#"Bearer realm="tideshift""#);
        let invalid = r#"Bearer realm="tideshift", error="invalid_token""#;
        assert_eq!(challenge(&[("authorization", "Bearer nobody-knows-this")]), invalid);
        let insufficient = r#"Bearer realm="tideshift", error="insufficient_scope", scope="operate""#;
        assert_eq!(challenge(&[("authorization", &format!("bEARER  {READ}"))]), insufficient);
    }

    #[test]
    fn what_changes_anything_must_be_json() {
        let authorization = format!("Bearer {OPERATE}");
        let authorization = ("authorization", authorization.as_str());
        for (kind, status) in [
            ("application/json", 200),
            ("Application/JSON; charset=utf-8", 200),
            ("text/plain", 415),
            ("application/x-www-form-urlencoded", 415),
            ("text/plain; application/json", 415),
        ] {
            let of = [authorization, ("content-type", kind)];
            assert_eq!(refusal(&tokens(), &[Scope::Operate], true, &of).0, status, "{kind}");
            assert_eq!(refusal(&Tokens::default(), &[Scope::Operate], true, &of[1..]).0, status, "{kind}");
        }
        assert_eq!(refusal(&tokens(), &[Scope::Operate], true, &[authorization]).0, 415);
    }

    #[test]
    fn without_tokens_no_page_of_somebody_else_gets_in() {
        let status = |of: &[(&'static str, &str)]| refusal(&Tokens::default(), &[Scope::Operate], false, of).0;
        for host in [
            "127.0.0.1:7460",
            "127.9.9.9",
            "[::1]:7460",
            "localhost",
            "LocalHost:7460",
            "a.localhost:1",
            "tideshift-controller",
            "tideshift_controller:80",
        ] {
            assert_eq!(status(&[("host", host)]), 200, "{host}");
            for (origin, expected) in [
                (format!("http://{host}"), 200),
                (format!("https://{host}"), 200),
                (format!("http://{host}.evil.example"), 403),
                ("http://evil.example".to_owned(), 403),
                ("null".to_owned(), 403),
                (String::new(), 403),
            ] {
                assert_eq!(status(&[("host", host), ("origin", &origin)]), expected, "{host}, {origin}");
            }
        }
        for host in ["evil.example", "evil.example:7460", "localhost.evil.example", "10.0.0.1", "", "[::2]", "a b", "@"]
        {
            assert_eq!(status(&[("host", host)]), 403, "{host}");
        }
        assert_eq!(status(&[]), 200, "no browser");
        // For a GET without an origin, the browser reports the site of the page that caused it.
        for (site, expected) in [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)] {
            assert_eq!(status(&[("host", "127.0.0.1:7460"), ("sec-fetch-site", site)]), expected, "{site}");
        }
        // A browser sends no token for a page that does not have it.
        let authorization = format!("Bearer {OPERATE}");
        let of = [("host", "tideshift.example"), ("authorization", authorization.as_str())];
        assert_eq!(refusal(&tokens(), &[Scope::Operate], false, &of).0, 200);
    }

    #[test]
    fn files_of_tokens_that_are_wrong_are_refused_without_saying_what_is_in_them() {
        for (text, why) in [
            ("", "no token in it; expected one on a line"),
            ("\n \n", "no token in it; expected one on a line"),
            ("0123456789abcdef\n\nhunter2\n", "line 3: a token is 16 to 512 visible ASCII characters"),
            ("two words two words", "line 1: expected TOKEN or NAME TOKEN"),
            ("two words two", "line 1: expected TOKEN or NAME TOKEN"),
            ("alice hunter2", "line 1: a token is 16 to 512 visible ASCII characters"),
            ("pässword pässword", "line 1: a token is 16 to 512 visible ASCII characters"),
        ] {
            let (dir, files) = files([None, Some(text), None]);
            let error = files.load().unwrap_err().to_string();
            assert_eq!(error, format!("--operate-token-file {}/1: {why}", dir.path().display()));
        }
        let absent = TokenFiles { proxy: Some("/absent".into()), ..TokenFiles::default() };
        let error = absent.load().unwrap_err().to_string();
        assert_eq!(error, "--proxy-token-file /absent: cannot be read: no such file or directory");
        assert!(!TokenFiles::default().load().unwrap().are_needed());
    }
}
