//! Counters, gauges and one histogram, in Prometheus' text exposition format 0.0.4.
//!
//! Labels come from closed sets of words in this program: no peer can make a new time series.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hyper::StatusCode;

use crate::{audit, places::Places, report::Report, store::Status, tls::Tls};

/// Upper bounds of the histogram, seconds. A request's time has the machine's TPM in it.
const BOUNDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0];

/// Why a connection ended without an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Drop {
    /// Every place was taken by machines that had proved themselves.
    Full,
    /// It made place for another.
    Crowded,
    /// Its peer said nothing.
    Silent,
    /// Its address had too many handshakes.
    Limited,
    /// No TLS came about.
    Tls,
    /// No HTTP request came about.
    Http,
}

impl Drop {
    fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Crowded => "crowded",
            Self::Silent => "silent",
            Self::Limited => "limited",
            Self::Tls => "tls",
            Self::Http => "http",
        }
    }
}

/// Counts by the values of labels.
type Counts<const LABELS: usize> = Mutex<BTreeMap<[&'static str; LABELS], u64>>;

/// All there is to tell.
#[derive(Debug)]
pub(crate) struct Metrics {
    started: f64,
    places: Arc<Places>,
    tls: Option<Arc<Tls>>,
    audit: Option<Arc<audit::Counts>>,
    requests: Counts<3>,
    durations: Mutex<BTreeMap<&'static str, Histogram>>,
    connections: AtomicU64,
    dropped: Counts<1>,
    limited: Counts<1>,
    answers: Mutex<BTreeMap<u16, u64>>,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Metrics {
    pub(crate) fn new(
        places: Arc<Places>,
        tls: Option<Arc<Tls>>,
        audit: Option<Arc<audit::Counts>>,
    ) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            started: started.as_secs_f64(),
            places,
            tls,
            audit,
            requests: Counts::default(),
            durations: Mutex::default(),
            connections: AtomicU64::new(0),
            dropped: Counts::default(),
            limited: Counts::default(),
            answers: Mutex::default(),
        }
    }

    /// A connection has come.
    pub(crate) fn connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection ended without an answer.
    pub(crate) fn dropped(&self, why: Drop) {
        *lock(&self.dropped).entry([why.as_str()]).or_default() += 1;
    }

    /// A rate limit refused something to `whose`.
    pub(crate) fn limited(&self, whose: &'static str) {
        *lock(&self.limited).entry([whose]).or_default() += 1;
    }

    /// An HTTP request was answered.
    pub(crate) fn answered(&self, status: StatusCode) {
        *lock(&self.answers).entry(status.as_u16()).or_default() += 1;
    }

    /// An exchange came to its end.
    pub(crate) fn request(&self, report: &Report, took: Duration) {
        let endpoint = report.endpoint.name();
        let labels = [endpoint, report.ending.result.as_str(), report.ending.reason];
        *lock(&self.requests).entry(labels).or_default() += 1;
        let mut durations = lock(&self.durations);
        let histogram = durations.entry(endpoint).or_default();
        let seconds = took.as_secs_f64();
        for (bucket, bound) in histogram.buckets.iter_mut().zip(BOUNDS) {
            *bucket += u64::from(seconds <= bound);
        }
        histogram.count += 1;
        histogram.sum += seconds;
    }

    /// The text that is scraped.
    pub(crate) fn render(&self, store: &Status) -> String {
        let mut page = Page(String::with_capacity(8 * 1024));
        page.one(
            "latchkey_kms_start_time_seconds",
            "gauge",
            "When the server started",
            self.started,
        );
        page.head("latchkey_kms_build_info", "gauge", "Version of the server");
        page.line("latchkey_kms_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        self.about_requests(&mut page);
        self.about_connections(&mut page);
        about_store(&mut page, store);
        if let Some(tls) = &self.tls {
            let (not_after, failures) = tls.state();
            if let Some(not_after) = not_after {
                page.one(
                    "latchkey_kms_tls_certificate_not_after_seconds",
                    "gauge",
                    "When the TLS certificate in use expires",
                    not_after,
                );
            }
            page.one(
                "latchkey_kms_tls_reload_failures_total",
                "counter",
                "Changed TLS files that could not be used",
                failures,
            );
        }
        if let Some(audit) = &self.audit {
            about_audit(&mut page, audit);
        }
        page.0
    }

    fn about_requests(&self, page: &mut Page) {
        let name = "latchkey_kms_requests_total";
        page.head(name, "counter", "Exchanges by endpoint, result and class of reason");
        for ([endpoint, result, reason], count) in lock(&self.requests).iter() {
            let labels = [("endpoint", *endpoint), ("result", *result), ("reason", *reason)];
            page.line(name, &labels, count);
        }
        let name = "latchkey_kms_request_duration_seconds";
        page.head(name, "histogram", "From the connection's first byte to the end of its exchange, the machine's TPM included");
        for (endpoint, histogram) in lock(&self.durations).iter() {
            let bucket = format!("{name}_bucket");
            for (count, bound) in histogram.buckets.iter().zip(BOUNDS) {
                let bound = bound.to_string();
                page.line(&bucket, &[("endpoint", endpoint), ("le", &bound)], count);
            }
            page.line(&bucket, &[("endpoint", endpoint), ("le", "+Inf")], histogram.count);
            page.line(&format!("{name}_sum"), &[("endpoint", endpoint)], histogram.sum);
            page.line(&format!("{name}_count"), &[("endpoint", endpoint)], histogram.count);
        }
        let name = "latchkey_kms_http_responses_total";
        page.head(name, "counter", "Answers to HTTP requests by status; 101 opens an exchange");
        for (code, count) in lock(&self.answers).iter() {
            page.line(name, &[("code", &code.to_string())], count);
        }
        let name = "latchkey_kms_rate_limited_total";
        page.head(name, "counter", "What a rate limit refused, by whose limit it was");
        for ([whose], count) in lock(&self.limited).iter() {
            page.line(name, &[("limit", whose)], count);
        }
    }

    fn about_connections(&self, page: &mut Page) {
        let count = self.connections.load(Ordering::Relaxed);
        page.one("latchkey_kms_connections_total", "counter", "Connections accepted", count);
        let open = self.places.open();
        page.one("latchkey_kms_connections_open", "gauge", "Connections open now", open);
        let name = "latchkey_kms_connections_dropped_total";
        page.head(name, "counter", "Connections that ended without an answer, by why");
        for ([why], count) in lock(&self.dropped).iter() {
            page.line(name, &[("why", why)], count);
        }
    }
}

fn about_store(page: &mut Page, store: &Status) {
    let readable = u8::from(store.readable);
    for (name, help, value) in [
        (
            "latchkey_kms_store_generation",
            "Grows with each change that was taken",
            store.generation,
        ),
        (
            "latchkey_kms_store_readable",
            "1 if the directory could be read at the last look",
            readable.into(),
        ),
        ("latchkey_kms_store_volumes", "SealedVolumes known", store.volumes as u64),
        ("latchkey_kms_store_secrets", "Secrets known", store.secrets as u64),
        (
            "latchkey_kms_store_unreadable_files",
            "Files with mistakes",
            store.unreadable_files as u64,
        ),
    ] {
        page.one(name, "gauge", help, value);
    }
}

fn about_audit(page: &mut Page, audit: &audit::Counts) {
    for (name, kind, help, value) in [
        ("latchkey_kms_audit_seq", "gauge", "Number of the audit log's last line", &audit.seq),
        (
            "latchkey_kms_audit_failures_total",
            "counter",
            "Writes of the audit log that failed",
            &audit.failures,
        ),
        (
            "latchkey_kms_audit_lost_lines_total",
            "counter",
            "Lines that found no room while the disk did not take any",
            &audit.lost,
        ),
    ] {
        page.one(name, kind, help, value.load(Ordering::Relaxed));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The text so far. Values of labels are ours and need no escaping.
struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}.\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        let mut open = '{';
        for (label, value) in labels {
            let _ = write!(self.0, "{open}{label}=\"{value}\"");
            open = ',';
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.head(name, kind, help);
        self.line(name, &[], value);
    }
}
