//! The web page at `/`: files in the binary, as they lie in `page/`. They know nothing: what they show comes from the
//! API, with the token that the user enters, so they need none themselves.

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Allows only resources of this server, and no inline code, `eval`, framing or form submission to other sites.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

/// A path, its media type and what is there.
type File = (&'static str, &'static str, &'static [u8]);

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

const FILES: [File; 14] = [
    ("/", HTML, include_bytes!("page/index.html")),
    ("/page/commands.js", SCRIPT, include_bytes!("page/commands.js")),
    ("/page/dom.js", SCRIPT, include_bytes!("page/dom.js")),
    ("/page/sse.js", SCRIPT, include_bytes!("page/sse.js")),
    ("/page/icon.svg", "image/svg+xml", include_bytes!("page/icon.svg")),
    ("/page/overview.js", SCRIPT, include_bytes!("page/overview.js")),
    ("/page/page.css", STYLE, include_bytes!("page/page.css")),
    ("/page/page.js", SCRIPT, include_bytes!("page/page.js")),
    ("/page/plots.js", SCRIPT, include_bytes!("page/plots.js")),
    ("/page/history.js", SCRIPT, include_bytes!("page/history.js")),
    ("/page/rollout.js", SCRIPT, include_bytes!("page/rollout.js")),
    ("/page/uPlot.iife.min.js", SCRIPT, include_bytes!("page/uPlot.iife.min.js")),
    ("/page/uPlot.min.css", STYLE, include_bytes!("page/uPlot.min.css")),
    ("/page/format.js", SCRIPT, include_bytes!("page/format.js")),
];

/// The page's routes: `/` and what it loads from `/page/`.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.into_iter().fold(Router::new(), |router, file| {
        let tag = tag(file.2);
        router.route(file.0, get(async move |headers: HeaderMap| answer(file, &tag, &headers)))
    })
}

/// Names the content, so that a browser which has it need not load it again.
fn tag(content: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}

fn answer((_, media_type, content): File, tag: &str, asked: &HeaderMap) -> Response {
    let headers = [
        (header::CONTENT_TYPE, media_type),
        (header::ETAG, tag),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    let has_it = asked.get(header::IF_NONE_MATCH).and_then(|tags| tags.to_str().ok());
    match has_it.is_some_and(|tags| tags.split(',').any(|had| had.trim().trim_start_matches("W/") == tag)) {
        true => (StatusCode::NOT_MODIFIED, headers).into_response(),
        false => (headers, content).into_response(),
    }
}
