//! Meters of what is told as it happens: a family for each line of the table that is `from Events`, there from the start
//! with every value of its label, so that nothing begins with a gap.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::{BUCKETS, Kind, Metric, Source, TABLE};

type Labels = Vec<(&'static str, &'static str)>;

/// The meters of a node. Telling one takes a lock that is held for some nanoseconds.
#[derive(Clone, Debug)]
pub struct Meters {
    all: Arc<BTreeMap<&'static str, Meter>>,
}

#[derive(Clone, Debug)]
enum Meter {
    Counter(Family<Labels, Counter<f64, AtomicU64>>),
    Gauge(Family<Labels, Gauge<f64, AtomicU64>>),
    Histogram(Family<Labels, Histogram, fn() -> Histogram>),
}

impl Default for Meters {
    fn default() -> Self {
        let told = TABLE.iter().filter(|metric| metric.source == Source::Events);
        Self { all: Arc::new(told.map(|metric| (metric.name, Meter::new(metric))).collect()) }
    }
}

impl Meters {
    /// A counter grows by so much.
    ///
    /// # Panics
    /// It is no counter that is told here, or has a label; as with all that follow, an own bug.
    pub fn add(&self, metric: Metric, more: f64) {
        self.add_to(metric, None, more);
    }

    /// A counter grows by so much, under this value of its label.
    ///
    /// # Panics
    /// It is no counter that is told here, or its label has no such value.
    pub fn add_for(&self, metric: Metric, value: &str, more: f64) {
        self.add_to(metric, Some(value), more);
    }

    /// A gauge is at this from now on.
    ///
    /// # Panics
    /// It is no gauge that is told here, or has a label.
    pub fn set(&self, metric: Metric, to: f64) {
        let Meter::Gauge(family) = self.meter(metric) else { panic!("{} is no gauge", metric.name) };
        family.get_or_create(&labels(metric, None)).set(to);
    }

    /// Something took so long.
    ///
    /// # Panics
    /// It is no histogram, or has a label.
    pub fn observe(&self, metric: Metric, took: Duration) {
        self.observe_in(metric, None, took);
    }

    /// Something took so long, under this value of the label.
    ///
    /// # Panics
    /// It is no histogram, or its label has no such value.
    pub fn observe_for(&self, metric: Metric, value: &str, took: Duration) {
        self.observe_in(metric, Some(value), took);
    }

    /// Puts them where they are read.
    pub(super) fn register(&self, registry: &mut Registry) {
        for metric in TABLE {
            let (name, help) = (metric.family(), metric.help);
            match self.all.get(metric.name) {
                Some(Meter::Counter(family)) => registry.register(name, help, family.clone()),
                Some(Meter::Gauge(family)) => registry.register(name, help, family.clone()),
                Some(Meter::Histogram(family)) => registry.register(name, help, family.clone()),
                None => {}
            }
        }
    }

    fn add_to(&self, metric: Metric, value: Option<&str>, more: f64) {
        let Meter::Counter(family) = self.meter(metric) else { panic!("{} is no counter", metric.name) };
        family.get_or_create(&labels(metric, value)).inc_by(more);
    }

    fn observe_in(&self, metric: Metric, value: Option<&str>, took: Duration) {
        let Meter::Histogram(family) = self.meter(metric) else { panic!("{} is no histogram", metric.name) };
        family.get_or_create(&labels(metric, value)).observe(took.as_secs_f64());
    }

    fn meter(&self, metric: Metric) -> &Meter {
        self.all.get(metric.name).unwrap_or_else(|| panic!("{} is not told by events", metric.name))
    }
}

impl Meter {
    fn new(metric: &Metric) -> Self {
        let values = metric.label.map_or(&[][..], |(_, values)| values);
        let each = values.iter().map(|value| Some(*value)).chain(values.is_empty().then_some(None));
        let each = each.map(|value| labels(*metric, value));
        match metric.kind {
            Kind::Counter => {
                let family = Family::<Labels, _>::default();
                each.for_each(|labels| drop(family.get_or_create(&labels)));
                Self::Counter(family)
            }
            Kind::Gauge => {
                let family = Family::<Labels, _>::default();
                each.for_each(|labels| drop(family.get_or_create(&labels)));
                Self::Gauge(family)
            }
            Kind::Histogram => {
                let new: fn() -> Histogram = || Histogram::new(BUCKETS);
                let family = Family::<Labels, _, _>::new_with_constructor(new);
                each.for_each(|labels| drop(family.get_or_create(&labels)));
                Self::Histogram(family)
            }
            Kind::Info => panic!("{} says what never changes: it is of the account", metric.name),
        }
    }
}

/// The labels of one sample, whose value must be one of the table's: so nothing grows without bound.
fn labels(metric: Metric, value: Option<&str>) -> Labels {
    match (metric.label, value) {
        (None, None) => Vec::new(),
        (Some((label, values)), Some(value)) => {
            let known = values.iter().find(|known| **known == value);
            vec![(label, known.unwrap_or_else(|| panic!("{} has no {label} {value:?}", metric.name)))]
        }
        _ => panic!("{} has its label always, or has none", metric.name),
    }
}
