//! Sections about what a node tells of itself: its metrics and its log.

use serde::Deserialize;
use std::net::SocketAddr;

use super::Problem;
use crate::telemetry;

/// `[metrics]`: the endpoint that Prometheus reads. Without `listen` there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// TCP address, `IP:PORT`, of `GET /metrics`, in the clear and for whoever asks; default none. Port 0 takes any free
    /// one, which the log tells.
    pub listen: Option<SocketAddr>,
    /// Lets it listen off loopback; default false.
    pub public: bool,
}

impl MetricsConfig {
    /// Rule 7: nothing is in the clear off loopback unless the operator says so; `admin` is the control plane's address.
    pub(super) fn check(&self, admin: SocketAddr) -> Result<(), Problem> {
        let Some(listen) = self.listen else { return Ok(()) };
        if !listen.ip().is_loopback() && !self.public {
            let text = format!(
                "{listen} is not on loopback, and metrics are told in the clear to whoever asks; listen on 127.0.0.1, or \
                 set metrics.public = true if the network there is trusted"
            );
            return Err(Problem::new("metrics.listen", text));
        }
        if listen == admin && listen.port() != 0 {
            let text = format!("{listen} is admin.listen as well; choose another port");
            return Err(Problem::new("metrics.listen", text));
        }
        Ok(())
    }
}

/// `[log]`: what is told on standard error. The environment wins: `RUST_LOG`, or else `COLO_LOG`, over `level`, and
/// `COLO_LOG_FORMAT` over `format`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `text` or `json`; default `text`.
    pub format: LogFormat,
    /// What is told: a level, or a filter such as `info,colo_secondary=debug`; default `info`.
    pub level: String,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: "info".to_owned() }
    }
}

impl LogConfig {
    pub(super) fn check(&self) -> Result<(), Problem> {
        telemetry::check_filter(&self.level).map_err(|why| {
            let text = format!(
                "{:?} is no filter: {why}; write a level (error, warn, info, debug, trace) or a filter such as \
                 \"info,colo_secondary=debug\"",
                self.level
            );
            Problem::new("log.level", text)
        })
    }
}
