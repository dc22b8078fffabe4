//! A log for machines: each event is one line with one JSON object, `time`, `level`, `target`, `message`, `fields` and
//! `span`. In `span` are the fields of all spans around the event; of two with one name the inner one's.

use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::Debug;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

/// Writes the lines.
pub(super) struct Lines<W> {
    write: W,
}

impl<W: Fn(&[u8])> Lines<W> {
    /// Each line, with its end, is one call of `write`.
    pub(super) fn new(write: W) -> Self {
        Self { write }
    }
}

/// One line.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: &'a str,
    target: &'a str,
    message: Value,
    fields: Map<String, Value>,
    span: Map<String, Value>,
}

/// What an event or a span has; of a span, kept beside it.
#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }
}

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(&[u8]) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut span = Map::new();
        for around in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(Fields(of_span)) = around.extensions().get() {
                span.extend(of_span.clone());
            }
        }
        let mut time = String::new();
        // A string takes all.
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        let line = Line {
            time,
            level: event.metadata().level().as_str(),
            target: event.metadata().target(),
            message: fields.0.remove("message").unwrap_or_else(|| "".into()),
            fields: fields.0,
            span,
        };
        // Plain values with names for keys always make JSON.
        if let Ok(mut bytes) = serde_json::to_vec(&line) {
            bytes.push(b'\n');
            (self.write)(&bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Lines;
    use crate::Term;
    use crate::telemetry::TermSpan;
    use serde_json::{Value, json};
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;

    fn lines(work: impl FnOnce()) -> Vec<Value> {
        let written: Arc<Mutex<Vec<u8>>> = Arc::default();
        let into = Arc::clone(&written);
        let layer = Lines::new(move |line| into.lock().unwrap().extend_from_slice(line));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_line_has_what_the_event_and_its_spans_have() {
        let told = lines(|| {
            let _node = tracing::error_span!("node", vm = %"web", node = %"a").entered();
            let mut term = TermSpan::default();
            term.follow(Term(3));
            tracing::warn!(pages = 7, share = 0.5, whole = true, why = "a \"b\"\nc", "said {}", "é");
            term.follow(Term(4));
            term.follow(Term(4));
            let _epoch = tracing::debug_span!("cut", term = 5, epoch = 9).entered();
            tracing::debug!(lag = -2);
        });
        let first = &told[0];
        assert_eq!(first["level"], "WARN");
        assert_eq!(first["target"], module_path!());
        assert_eq!(first["message"], "said é");
        assert_eq!(first["fields"], json!({"pages": 7, "share": 0.5, "whole": true, "why": "a \"b\"\nc"}));
        assert_eq!(first["span"], json!({"vm": "web", "node": "a", "term": 3}));
        let time = first["time"].as_str().unwrap();
        assert!(time.len() >= 20 && time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");
        assert_eq!(told[1]["message"], "");
        assert_eq!(told[1]["fields"], json!({"lag": -2}));
        assert_eq!(
            told[1]["span"],
            json!({"vm": "web", "node": "a", "term": 5, "epoch": 9}),
            "the inner term"
        );
    }

    #[test]
    fn what_is_recorded_again_is_replaced() {
        let told = lines(|| {
            let span = tracing::info_span!("s", term = tracing::field::Empty);
            span.record("term", 1_u64);
            span.record("term", 2_u64);
            span.in_scope(|| tracing::info!("x"));
        });
        assert_eq!(told[0]["span"], json!({"term": 2}));
    }
}
