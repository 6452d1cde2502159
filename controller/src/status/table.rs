//! The status as tables, for people.

use super::{DrainState, ProxyStatus, ServiceStatus, Status, VersionStatus, VetoStatus};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::fmt::Write;

impl Status {
    /// The status as text: a table of versions for each service, then the proxies.
    pub fn to_table(&self) -> String {
        let mut text = String::new();
        for error in &self.document_errors {
            let _ = writeln!(text, "not in force: {error}");
        }
        if let Some(error) = &self.state_error {
            let _ = writeln!(text, "not safe from a restart: {error}");
        }
        for service in &self.services {
            let _ = writeln!(text, "{}\n{}", service.heading(), service.table());
            if let Some(verdict) = &service.verdict {
                let _ = writeln!(text, "verdict: {}", verdict.message);
            }
            text.push('\n');
        }
        let _ = match self.proxies.is_empty() {
            true => writeln!(text, "revision {}; no proxy has asked for it yet", self.revision),
            false => writeln!(text, "revision {}\n{}", self.revision, proxies(&self.proxies)),
        };
        text
    }
}

impl ServiceStatus {
    fn heading(&self) -> String {
        let mut heading = match self.name == self.rollout {
            true => format!("{}: {}", self.name, self.phase.name()),
            false => format!("{} ({}): {}", self.name, self.rollout, self.phase.name()),
        };
        if let Some(step) = &self.step {
            let _ = write!(heading, ", step {} of {} ({} %", step.number, step.of, step.weight);
            let _ = match step.held_seconds {
                Some(held) if step.hold_seconds > 0 => write!(heading, ", held {held} of {} s)", step.hold_seconds),
                Some(_) => write!(heading, ")"),
                None => write!(heading, ", not reached yet)"),
            };
        }
        let _ = write!(heading, " - {}", self.message);
        if self.unrouted > 0 {
            let _ = write!(heading, "; {} requests found nothing in service", self.unrouted);
        }
        heading
    }

    fn table(&self) -> Table {
        let columns = [
            "VERSION",
            "ROLE",
            "WEIGHT",
            "READY",
            "OK",
            "ERROR",
            "CLIENT ERROR",
            "CANCELLED",
            "IN FLIGHT",
            "NOT READY",
        ];
        let mut table = plain(&columns);
        for version in &self.versions {
            table.add_row(self.row(version));
        }
        for numeric in 2..=8 {
            if let Some(column) = table.column_mut(numeric) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    fn row(&self, version: &VersionStatus) -> Vec<String> {
        let role = match &version.name {
            name if *name == self.stable => "stable",
            name if Some(name) == self.target.as_ref() => "target",
            _ => match version.drain.state {
                DrainState::Serving | DrainState::Drained => "",
                DrainState::Draining => "draining",
                DrainState::DeadlineExceeded => "not drained in time",
            },
        };
        let reason = version.endpoints.not_ready.first().map_or(String::new(), |first| {
            let more = version.endpoints.not_ready.len() - 1;
            let reason = first.reason.as_deref().unwrap_or("not probed yet");
            let others = if more > 0 { format!(" (and {more} more)") } else { String::new() };
            format!("{}: {reason}{others}", first.endpoint)
        });
        vec![
            version.name.clone(),
            role.to_owned(),
            format!("{} %", version.weight),
            format!("{}/{}", version.endpoints.ready, version.endpoints.listed),
            version.requests.ok.to_string(),
            version.requests.error.to_string(),
            version.requests.client_error.to_string(),
            version.requests.cancelled.to_string(),
            version.in_flight.to_string(),
            reason,
        ]
    }
}

fn proxies(proxies: &[ProxyStatus]) -> Table {
    let mut table = plain(&["PROXY", "REVISION", "WORKERS", "LAST SEEN", "REFUSED", "GUARD KEEPS OUT"]);
    for proxy in proxies {
        let refused = proxy.refused.as_ref().map_or(String::new(), |refused| refused.errors.join("; "));
        table.add_row([
            proxy.id.clone(),
            proxy.revision.map_or("its own".to_owned(), |revision| revision.to_string()),
            proxy.workers.to_string(),
            format!("{:.0}", proxy.last_seen),
            refused,
            proxy.vetoes.iter().map(veto).collect::<Vec<_>>().join("; "),
        ]);
    }
    table
}

fn veto(veto: &VetoStatus) -> String {
    let VetoStatus { service, version, errors, requests, others_errors, others_requests, .. } = veto;
    format!("{version} of {service}: {errors} of {requests} failed, of the others {others_errors} of {others_requests}")
}

fn plain(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(columns);
    table
}
