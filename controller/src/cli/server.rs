//! Asking a running controller, for the subcommands that do.

use super::Failure;
use crate::net;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Where the controller listens unless told otherwise.
pub(super) const DEFAULT: &str = "http://127.0.0.1:7460";

/// The JSON document at a path of the controller, such as `/v1/status`.
pub(super) async fn get<T: DeserializeOwned>(server: &str, path: &str) -> Result<T, Failure> {
    let url = format!("{}{path}", server.trim_end_matches('/'));
    let failed = |why: String| Failure::Other(format!("{url}: {why}; is `tideshift serve` running there?").into());
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build();
    let client = client.map_err(|error| failed(error.to_string()))?;
    let response = client.get(&url).send().await.map_err(|error| failed(net::reason(&error)))?;
    if response.status() != reqwest::StatusCode::OK {
        return Err(failed(format!("status {}", response.status())));
    }
    response.json().await.map_err(|error| failed(format!("not what was expected: {}", net::reason(&error))))
}
