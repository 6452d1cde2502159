//! Limits, for each namespace, on concurrent requests that documents cause: probes, warm-ups and webhooks.
//!
//! Each namespace has a few reserved slots that no other namespace can take. Beyond those it competes for shared slots,
//! up to a limit. The total is therefore bounded, a namespace with slow endpoints delays only itself, and several such
//! namespaces together cannot take the reserved slots of another.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};

/// The limits for all requests that documents cause; cheap to clone.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Probes.
    pub probes: Limit,
    /// Warm-up requests.
    pub warm_ups: Limit,
    /// Webhook requests.
    pub webhooks: Limit,
}

impl Limits {
    /// The limits in a cluster, where documents belong to several tenants.
    pub fn of_cluster() -> Self {
        Self {
            probes: Limit::new(16, 240, 1_024),
            warm_ups: Limit::new(10, 90, 400).with_budget(100_000, 200),
            webhooks: Limit::new(2, 14, 64),
        }
    }

    /// The limits outside a cluster, where all documents belong to one operator: a total, with no separate share for a
    /// namespace.
    pub fn of_machine() -> Self {
        Self { probes: Limit::new(2_048, 0, 0), warm_ups: Limit::new(1_024, 0, 0), webhooks: Limit::new(64, 0, 0) }
    }
}

/// A limit for requests of one kind; cheap to clone.
#[derive(Debug, Clone)]
pub struct Limit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The slots reserved for each namespace, and the shared slots it may use in addition.
    own: usize,
    besides: usize,
    /// The shared slots.
    common: Arc<Semaphore>,
    /// Burst and requests per second of each namespace.
    budget: Option<(u32, u32)>,
    /// The namespaces with requests in flight, by name.
    tenants: Mutex<BTreeMap<String, Weak<Tenant>>>,
}

/// What a namespace uses. It exists while the namespace has requests in flight or its budget is not yet full again.
#[derive(Debug)]
struct Tenant {
    own: Arc<Semaphore>,
    besides: Arc<Semaphore>,
    budget: Option<Mutex<Budget>>,
}

/// A slot, held until this is dropped.
#[derive(Debug)]
pub struct Place {
    _places: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
    _tenant: Arc<Tenant>,
}

impl Limit {
    /// A limit with `own` reserved slots for each namespace, up to `besides` more for each, and `common` shared slots.
    pub fn new(own: usize, besides: usize, common: usize) -> Self {
        let (common, tenants) = (Arc::new(Semaphore::new(common)), Mutex::default());
        Self(Arc::new(Shared { own, besides, common, budget: None, tenants }))
    }

    /// Adds a rate limit: each namespace may send `burst` requests at once, then `per_second`.
    fn with_budget(self, burst: u32, per_second: u32) -> Self {
        let Shared { own, besides, .. } = *self.0;
        let (common, tenants) = (Arc::clone(&self.0.common), Mutex::default());
        Self(Arc::new(Shared { own, besides, common, budget: Some((burst, per_second)), tenants }))
    }

    /// Waits for a slot; first come, first served within a namespace.
    pub async fn admit(&self, namespace: &str) -> Place {
        let tenant = self.tenant(namespace);
        loop {
            let wait = tenant.budget.as_ref().map_or(Duration::ZERO, |budget| {
                budget.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now())
            });
            if wait.is_zero() {
                break;
            }
            sleep(wait).await;
        }
        let common = async {
            let besides = Arc::clone(&tenant.besides).acquire_owned().await;
            (besides, Some(Arc::clone(&self.0.common).acquire_owned().await))
        };
        let places = tokio::select! {
            biased;
            own = Arc::clone(&tenant.own).acquire_owned() => (own, None),
            places = common => places,
        };
        match places {
            (Ok(place), None) => Place { _places: (place, None), _tenant: tenant },
            (Ok(place), Some(Ok(common))) => Place { _places: (place, Some(common)), _tenant: tenant },
            // The semaphores are never closed.
            (Err(_), _) | (_, Some(Err(_))) => std::future::pending().await,
        }
    }

    fn tenant(&self, namespace: &str) -> Arc<Tenant> {
        let mut tenants = self.0.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tenant) = tenants.get(namespace).and_then(Weak::upgrade) {
            return tenant;
        }
        tenants.retain(|_, tenant| tenant.strong_count() > 0);
        let tenant = Arc::new(Tenant {
            own: Arc::new(Semaphore::new(self.0.own)),
            besides: Arc::new(Semaphore::new(self.0.besides)),
            budget: self.0.budget.map(|(burst, rate)| Mutex::new(Budget::new(burst, rate, Instant::now()))),
        });
        tenants.insert(namespace.to_owned(), Arc::downgrade(&tenant));
        if let Some((burst, rate)) = self.0.budget {
            // Kept until the budget is full again; otherwise a namespace could refill it by ending and restarting its
            // requests.
            let (tenant, full) = (Arc::clone(&tenant), Duration::from_secs((burst / rate.max(1)).into()));
            tokio::spawn(async move {
                loop {
                    sleep(full).await;
                    if Arc::strong_count(&tenant) == 1 {
                        break;
                    }
                }
            });
        }
        tenant
    }
}

/// A token bucket.
#[derive(Debug)]
struct Budget {
    burst: f64,
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Budget {
    fn new(burst: u32, per_second: u32, now: Instant) -> Self {
        Self { burst: burst.into(), per_second: per_second.into(), left: burst.into(), at: now }
    }

    /// Takes a token if one is available; otherwise returns how long to wait before the next attempt.
    fn take(&mut self, now: Instant) -> Duration {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_second;
        (self.left, self.at) = ((self.left + gained).min(self.burst), now);
        if self.left >= 1.0 {
            self.left -= 1.0;
            return Duration::ZERO;
        }
        Duration::from_secs_f64((1.0 - self.left) / self.per_second).max(Duration::from_millis(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    /// The slots that a namespace gets without waiting.
    fn at_once(limit: &Limit, namespace: &str) -> Vec<Place> {
        std::iter::from_fn(|| limit.admit(namespace).now_or_never()).collect()
    }

    #[tokio::test]
    async fn a_namespace_cannot_use_up_what_others_have() {
        let limit = Limit::new(2, 3, 4);
        let (first, second) = (at_once(&limit, "a"), at_once(&limit, "b"));
        assert_eq!((first.len(), second.len()), (5, 3), "2 of its own and 3 besides; then 2 and what is left of the 4");
        assert_eq!(at_once(&limit, "c").len(), 2, "its own, whatever the others hold");
        let third = at_once(&limit, "c");
        assert_eq!(third.len(), 2);
        drop(first);
        assert_eq!(at_once(&limit, "c").len(), 3, "what the first has given back, up to its own limit");
    }

    #[tokio::test]
    async fn who_waits_gets_the_first_place_that_is_free() {
        let limit = Limit::new(1, 0, 0);
        let place = limit.admit("a").await;
        let waiting = tokio::spawn({
            let limit = limit.clone();
            async move { drop(limit.admit("a").await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(place);
        waiting.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_bounds_what_is_sent_over_time_and_ending_does_not_fill_it() {
        let limit = Limit::new(10, 0, 0).with_budget(5, 2);
        let begun = Instant::now();
        for _ in 0..9 {
            drop(limit.admit("a").await);
        }
        assert!(
            (1_999..2_100).contains(&begun.elapsed().as_millis()),
            "{:?}: 5 at once, 4 more at 2 per second",
            begun.elapsed()
        );
        limit.admit("b").now_or_never().expect("another namespace has a budget of its own");
    }

    #[test]
    fn a_budget_is_never_more_than_its_burst() {
        let now = Instant::now();
        let mut budget = Budget::new(2, 1, now);
        let later = now + Duration::from_secs(1_000);
        assert_eq!([0, 1, 2].map(|_| budget.take(later).is_zero()), [true, true, false]);
        assert_eq!(budget.take(later), Duration::from_secs(1));
    }
}
