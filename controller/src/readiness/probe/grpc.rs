//! The `grpc` probe, as the kubelet does it: one call of `grpc.health.v1.Health/Check` on its own connection, without
//! TLS; `SERVING` is success.

use crate::net::cause;
use std::error::Error;
use tideshift_core::shift::Endpoint;
use tonic::transport;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Whether the server at `endpoint` reports that `service` is serving. The caller limits the time.
pub(super) async fn check(endpoint: &Endpoint, service: &str) -> Result<(), String> {
    let server = transport::Endpoint::from_shared(format!("http://{endpoint}"))
        .and_then(|endpoint| endpoint.user_agent(concat!("tideshift-probe/", env!("CARGO_PKG_VERSION"))))
        .map_err(|error| cause(&error))?;
    let mut health = HealthClient::new(server.connect().await.map_err(|error| cause(&error))?);
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = health.check(request).await.map_err(|status| match status.source() {
        // The server did not send this status: the client derives it from a broken connection.
        Some(error) => format!("no gRPC answer: {}", cause(error)),
        None => format!("gRPC status {} ({:?})", status.code() as i32, status.code()),
    })?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        other => Err(format!("gRPC health {}", other.as_str_name())),
    }
}
