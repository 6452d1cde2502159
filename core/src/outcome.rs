//! Classifies how an exchange ended: an error of the version, an error of the client, or neither.

use crate::decode::Decoder;
#[cfg(feature = "schema")]
use crate::schema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::ops::RangeInclusive;

/// How one request of a client ended, including retries and hedging by the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The version answered.
    Ok,
    /// The request failed because of the version.
    Error,
    /// The version rejected the client's request.
    ClientError,
    /// The client disconnected before the response was complete; never counts against the version.
    Cancelled,
}

impl Outcome {
    /// Every outcome, in the order of the metrics' documentation.
    pub const ALL: [Self; 4] = [Self::Ok, Self::Error, Self::ClientError, Self::Cancelled];

    /// The value of the metrics' label `outcome`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::ClientError => "client_error",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The proxy's information about an exchange when it has ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ending {
    /// The HTTP status that the client received; `None` if no response had started.
    pub status: Option<u16>,
    /// `grpc-status` from the trailers of the response, or from its headers if it has no other part.
    pub grpc_status: Option<u32>,
    /// Whether it was a gRPC request, which requires a gRPC status.
    pub is_grpc: bool,
    /// Envoy's response flags as the bits of its `response.flags` attribute.
    pub flags: u64,
    /// Whether the server of a WebSocket has closed it.
    pub is_closed: bool,
}

/// Response flags of Envoy 1.40 that indicate a failure of the version, whatever the status: no healthy host, timeout,
/// reset by the upstream (also during a response), connect failure, connection terminated, overflow, retries exhausted,
/// maximum stream duration, duration timeout, protocol error, no such cluster, DNS.
const VERSION_FAILED: u64 =
    0x2 | 0x4 | 0x10 | 0x20 | 0x40 | 0x80 | 0x8000 | 0x8_0000 | 0x40_0000 | 0x80_0000 | 0x100_0000 | 0x400_0000;

/// Which results count as errors of the version, for one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(into = "WrittenErrorCodes")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(with = "WrittenErrorCodes"))]
pub struct ErrorCodes {
    status: Vec<RangeInclusive<u16>>,
    grpc: Vec<u32>,
}

/// [`ErrorCodes`] as documents have it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(deny_unknown_fields))]
struct WrittenErrorCodes {
    /// HTTP statuses, such as 429, and ranges, such as "500-599", which is the default.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::StatusRange>>", extend("default" = ["500-599"])))]
    status_codes: Vec<String>,
    /// gRPC statuses; default 2 (UNKNOWN), 4 (DEADLINE_EXCEEDED), 12 (UNIMPLEMENTED), 13 (INTERNAL), 14 (UNAVAILABLE), 15
    /// (DATA_LOSS).
    #[cfg_attr(feature = "schema", schemars(with = "Option<Vec<schema::GrpcStatus>>", extend("default" = [2, 4, 12, 13, 14, 15])))]
    grpc_status_codes: Vec<u32>,
}

impl From<ErrorCodes> for WrittenErrorCodes {
    fn from(codes: ErrorCodes) -> Self {
        let range = |range: &RangeInclusive<u16>| match range.start() == range.end() {
            true => range.start().to_string(),
            false => format!("{}-{}", range.start(), range.end()),
        };
        Self { status_codes: codes.status.iter().map(range).collect(), grpc_status_codes: codes.grpc }
    }
}

impl Default for ErrorCodes {
    /// 500 to 599; gRPC `UNKNOWN`, `DEADLINE_EXCEEDED`, `UNIMPLEMENTED`, `INTERNAL`, `UNAVAILABLE`, `DATA_LOSS`.
    fn default() -> Self {
        Self { status: vec![500..=599], grpc: vec![2, 4, 12, 13, 14, 15] }
    }
}

impl ErrorCodes {
    /// The outcome of an exchange. A failure that the proxy observed itself (a reset, a timeout) is the version's
    /// regardless of the codes; a response is an error only if the codes say so.
    pub fn outcome(&self, ending: &Ending) -> Outcome {
        let is_error = |status: u16| self.status.iter().any(|range| range.contains(&status));
        // A WebSocket connection always ends abruptly; that is fine if the server or the client closed it.
        if ending.status == Some(101) && (ending.is_closed || ending.is_client_gone()) {
            return Outcome::Ok;
        }
        if ending.flags & VERSION_FAILED != 0
            || ending.status.is_some_and(is_error)
            || ending.grpc_status.is_some_and(|status| self.grpc.contains(&status))
        {
            return Outcome::Error;
        }
        if ending.is_client_gone() {
            return Outcome::Cancelled;
        }
        match (ending.status, ending.grpc_status) {
            (None, _) => Outcome::Cancelled,
            // With status 1, CANCELLED, and a connected client it was the server that cancelled.
            (Some(400..=499), _) | (_, Some(1..)) => Outcome::ClientError,
            (Some(_), None) if ending.is_grpc => Outcome::Error,
            _ => Outcome::Ok,
        }
    }

    pub(crate) fn read(d: &mut Decoder, value: &Value) -> Option<Self> {
        let default = Self::default();
        let mut f = d.object(value)?;
        let status = f.optional(d, "statusCodes", |d, v| d.list(v, status_range));
        let grpc = f.optional(d, "grpcStatusCodes", |d, v| d.list(v, |d, v| d.integer(v, 1, 16)));
        f.finish(d);
        Some(Self {
            status: status.map_or(default.status, |codes| codes.into_iter().map(|(_, range)| range).collect()),
            grpc: grpc.map_or(default.grpc, |codes| codes.into_iter().map(|(_, code)| code as u32).collect()),
        })
    }
}

impl Ending {
    /// Whether the exchange has not really ended: there is no response and no failure. Envoy reports this when it
    /// follows an internal redirect; the request then passes the filter again.
    pub fn goes_on(&self) -> bool {
        self.status.is_none() && self.flags == 0
    }

    /// Whether the client ended it: it closed the connection, reset the stream, or broke the protocol.
    fn is_client_gone(&self) -> bool {
        const DOWNSTREAM: u64 = 0x4000 | 0x4_0000 | 0x1000_0000;
        self.flags & DOWNSTREAM != 0
    }
}

/// Parses a status or a range of statuses: `429`, `"429"`, `"500-599"`.
pub(crate) fn status_range(d: &mut Decoder, value: &Value) -> Option<RangeInclusive<u16>> {
    let parsed = match value {
        Value::String(text) => {
            let (low, high) = text.split_once('-').unwrap_or((text, text));
            low.trim().parse().ok().zip(high.trim().parse().ok())
        }
        Value::Number(number) => number.as_u64().and_then(|code| u16::try_from(code).ok()).map(|code| (code, code)),
        _ => None,
    };
    match parsed {
        Some((low, high)) if (100..=599).contains(&low) && (low..=599).contains(&high) => Some(low..=high),
        _ => {
            d.invalid(value, "a status code from 100 to 599, or a range such as \"500-599\"");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn outcome(status: Option<u16>, grpc_status: Option<u32>, flags: u64) -> Outcome {
        ErrorCodes::default().outcome(&Ending { status, grpc_status, flags, ..Ending::default() })
    }

    #[test]
    fn statuses_speak_for_themselves() {
        assert_eq!(outcome(Some(200), None, 0), Outcome::Ok);
        assert_eq!(outcome(Some(304), None, 0), Outcome::Ok);
        assert_eq!(outcome(Some(404), None, 0), Outcome::ClientError);
        assert_eq!(outcome(Some(500), None, 0), Outcome::Error);
        assert_eq!(outcome(Some(599), None, 0), Outcome::Error);
    }

    /// Endings measured on Envoy 1.40: upstream reset, route timeout, connect refused, missing cluster, no route,
    /// retries exhausted, client gone.
    #[test]
    fn flags_say_what_the_status_does_not() {
        assert_eq!(outcome(Some(503), None, 64), Outcome::Error);
        assert_eq!(outcome(Some(504), None, 4), Outcome::Error);
        assert_eq!(outcome(Some(503), None, 32), Outcome::Error);
        assert_eq!(outcome(Some(503), None, 16_777_216), Outcome::Error);
        assert_eq!(outcome(Some(404), None, 256), Outcome::ClientError);
        assert_eq!(outcome(Some(500), None, 32_768), Outcome::Error);
        assert_eq!(outcome(None, None, 16_384), Outcome::Cancelled);
    }

    #[test]
    fn an_answer_that_breaks_off_is_blamed_on_who_broke_it() {
        assert_eq!(outcome(Some(200), None, 64), Outcome::Error);
        assert_eq!(outcome(Some(200), None, 16_384), Outcome::Cancelled);
        assert_eq!(outcome(Some(500), None, 16_384), Outcome::Error);
    }

    /// Measured on Envoy 1.40: connection termination by the upstream and by the client.
    #[test]
    fn a_websocket_that_somebody_closed_is_fine() {
        let outcome = |flags, is_closed| {
            ErrorCodes::default().outcome(&Ending { status: Some(101), flags, is_closed, ..Ending::default() })
        };
        assert_eq!(outcome(0x40, true), Outcome::Ok);
        assert_eq!(outcome(0x40, false), Outcome::Error);
        assert_eq!(outcome(16_384, false), Outcome::Ok);
    }

    #[test]
    fn grpc_statuses_count_by_whose_fault_they_are() {
        assert_eq!(outcome(Some(200), Some(0), 0), Outcome::Ok);
        assert_eq!(outcome(Some(200), Some(14), 0), Outcome::Error);
        assert_eq!(outcome(Some(200), Some(5), 0), Outcome::ClientError);
        assert_eq!(outcome(Some(200), Some(1), 0), Outcome::ClientError, "the server says so, and the client is there");
        assert_eq!(outcome(Some(200), Some(1), 16_384), Outcome::Cancelled);
        let without = Ending { status: Some(200), is_grpc: true, ..Ending::default() };
        assert_eq!(ErrorCodes::default().outcome(&without), Outcome::Error);
        let gone = Ending { flags: 16_384, ..without };
        assert_eq!(ErrorCodes::default().outcome(&gone), Outcome::Cancelled);
    }

    /// `local_reply_config` can change the status; the flags still show what Envoy observed.
    #[test]
    fn a_rewritten_local_reply_is_what_it_was() {
        assert_eq!(outcome(Some(200), None, 32), Outcome::Error);
        assert_eq!(outcome(Some(404), None, 4), Outcome::Error);
    }

    #[test]
    fn a_service_says_what_is_an_error() {
        let read = |text: &str| {
            let value = serde_json::from_str(text).map_err(|e| e.to_string())?;
            Decoder::read(&value, ErrorCodes::read).map_err(|e| e.to_string())
        };
        let codes = read(r#"{"statusCodes": [429, "502-504"], "grpcStatusCodes": []}"#).unwrap_or_default();
        let outcome =
            |status, grpc_status| codes.outcome(&Ending { status: Some(status), grpc_status, ..Ending::default() });
        assert_eq!(outcome(429, None), Outcome::Error);
        assert_eq!(outcome(500, None), Outcome::Ok);
        assert_eq!(outcome(503, None), Outcome::Error);
        assert_eq!(outcome(200, Some(14)), Outcome::ClientError);
        for bad in ["600", "\"504-502\"", "\"5xx\"", "\"-\"", "99", "true"] {
            let read = read(&format!(r#"{{"statusCodes": [{bad}]}}"#));
            assert!(read.is_err_and(|e| e.starts_with("statusCodes[0]: ")), "{bad}");
        }
    }
}
