//! Asking a running controller, for the subcommands that do.

use super::Failure;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Where the controller listens unless told otherwise.
pub(super) const DEFAULT: &str = "http://127.0.0.1:7460";

/// The JSON document at a path of the controller, such as `/v1/status`.
pub(super) async fn get<T: DeserializeOwned>(server: &str, path: &str) -> Result<T, Failure> {
    let url = format!("{}{path}", server.trim_end_matches('/'));
    let failed = |why: String| Failure::Other(format!("{url}: {why}; is `tideshift serve` running there?").into());
    let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build();
    let client = client.map_err(|error| failed(error.to_string()))?;
    let response = client.get(&url).send().await.map_err(|error| failed(root_cause(&error)))?;
    if response.status() != reqwest::StatusCode::OK {
        return Err(failed(format!("status {}", response.status())));
    }
    response.json().await.map_err(|error| failed(format!("not what was expected: {}", root_cause(&error))))
}

fn root_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => root_cause(source),
        None => error.to_string(),
    }
}
