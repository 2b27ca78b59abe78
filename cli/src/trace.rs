//! `--trace`: how much time passes inside the spans forward, backward, factors, inverse and step.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tracing::{Subscriber, span};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Count and sum of the times of each kind of span.
#[derive(Clone, Default)]
pub struct Times(Arc<Mutex<BTreeMap<&'static str, (u32, Duration)>>>);

/// When a span was entered.
struct Entered(Instant);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Times {
    fn on_enter(&self, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            span.extensions_mut().replace(Entered(Instant::now()));
        }
    }

    fn on_exit(&self, id: &span::Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let Some(Entered(start)) = span.extensions_mut().remove() else { return };
        if let Ok(mut all) = self.0.lock() {
            let (count, sum) = all.entry(span.name()).or_default();
            *count += 1;
            *sum += start.elapsed();
        }
    }
}

impl Times {
    /// Shows the library's warnings on the error output, and measures spans if `measure`.
    pub fn install(measure: bool) -> Self {
        let times = Self::default();
        let stderr = std::io::stderr;
        let warnings = fmt::layer().without_time().with_ansi(stderr().is_terminal()).with_writer(stderr);
        let warnings = warnings.with_filter(Targets::new().with_target("kronwake", LevelFilter::WARN));
        let spans =
            Targets::new().with_target("kronwake", LevelFilter::INFO).with_target("mnist", LevelFilter::INFO);
        let measured = measure.then(|| times.clone().with_filter(spans));
        tracing_subscriber::registry().with(warnings).with(measured).init();
        times
    }

    /// The times as a table, the largest first. A span inside another counts in both.
    pub fn table(&self) -> String {
        let Ok(all) = self.0.lock() else { return String::new() };
        let mut rows: Vec<_> = all.iter().collect();
        rows.sort_by_key(|(_, (_, sum))| std::cmp::Reverse(*sum));
        let mut table = String::from("span            times    total s    mean ms\n");
        for (name, (count, sum)) in rows {
            let mean = 1e3 * sum.as_secs_f64() / f64::from(*count);
            table.push_str(&format!("{name:12} {count:8} {:10.3} {mean:10.3}\n", sum.as_secs_f64()));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_counted_and_timed() {
        let times = Times::default();
        let subscriber = tracing_subscriber::registry().with(times.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info_span!("outer").in_scope(|| {
                for _ in 0..3 {
                    tracing::info_span!("inner").in_scope(|| std::thread::sleep(Duration::from_millis(5)));
                }
            });
        });
        let all = times.0.lock().unwrap();
        let (outer, inner) = (all["outer"], all["inner"]);
        assert_eq!((outer.0, inner.0), (1, 3));
        assert!(inner.1 >= Duration::from_millis(15) && outer.1 >= inner.1, "{outer:?} {inner:?}");
    }
}
