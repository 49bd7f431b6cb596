//! An engine in a thread of its own. Whoever has a request hands it over with a function that takes its outputs, and
//! keeps a [`Ticket`]: where that is dropped, the request ends, and its pages are free before the next step.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::engine::{Engine, Limits, Output, RequestId, Stats};
use crate::error::{Error, Result};
use crate::guide::Guide;
use crate::sampler::SamplingParams;

/// Takes the outputs of a request, in the engine's thread: it must not wait.
pub type Sink = Box<dyn FnMut(Output) + Send>;

/// See the module.
pub struct Service {
    orders: Sender<Order>,
    shared: Arc<Shared>,
    limits: Limits,
    /// Requests that may be under way, running or waiting.
    most: usize,
    tickets: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// Places that are taken: those of requests that are not over, and those that were reserved.
    under_way: AtomicUsize,
    stats: Mutex<Stats>,
    /// The last step failed.
    failed: AtomicBool,
}

enum Order {
    Submit { ticket: u64, prompt: Vec<u32>, params: SamplingParams, guide: Option<Box<dyn Guide>>, sink: Sink },
    Cancel { ticket: u64 },
}

/// A request under way; dropping it ends the request.
pub struct Ticket {
    ticket: u64,
    orders: Sender<Order>,
}

/// Places among those of requests that may be under way, for requests that are about to come. Dropping it gives back
/// those that were not filled.
pub struct Places {
    shared: Arc<Shared>,
    left: usize,
}

impl Drop for Places {
    fn drop(&mut self) {
        self.shared.under_way.fetch_sub(self.left, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Without an engine there is nothing to cancel.
        let _ = self.orders.send(Order::Cancel { ticket: self.ticket });
    }
}

impl Service {
    /// Starts the thread. At most `most` requests may be under way, running or waiting.
    pub fn start(engine: Engine, most: usize) -> Self {
        let (orders, inbox) = channel();
        let shared = Arc::new(Shared { stats: Mutex::new(engine.stats()), ..Shared::default() });
        let limits = engine.limits();
        let worker =
            Worker { engine, inbox, shared: Arc::clone(&shared), requests: HashMap::new(), ids: HashMap::new() };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || worker.work());
        let thread = Some(thread.expect("a process can have one more thread"));
        Service { orders, shared, limits, most, tickets: AtomicU64::new(0), thread }
    }

    /// What a request may ask for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Requests that may be under way, running or waiting.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Takes so many places, all or none.
    ///
    /// # Errors
    /// Where so many are not free: [`Error::Busy`].
    pub fn reserve(&self, count: usize) -> Result<Places> {
        let more = |n: usize| n.checked_add(count).filter(|n| *n <= self.most);
        let taken = self.shared.under_way.try_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.map_err(|under_way| Error::Busy { under_way })?;
        Ok(Places { shared: Arc::clone(&self.shared), left: count })
    }

    /// Hands a request over, which fills one of `places`.
    ///
    /// # Errors
    /// Where the request means nothing, or no place is left: [`Error::Busy`].
    pub fn submit(
        &self,
        places: &mut Places,
        prompt: Vec<u32>,
        params: SamplingParams,
        guide: Option<Box<dyn Guide>>,
        sink: Sink,
    ) -> Result<Ticket> {
        self.limits.check(&prompt, &params)?;
        let left = places.left.checked_sub(1).ok_or_else(|| Error::Busy { under_way: self.under_way() })?;
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let order = Order::Submit { ticket, prompt, params, guide, sink };
        self.orders.send(order).map_err(|_| Error::device("engine", "it has stopped; see the log, and start again"))?;
        // From here on the engine gives the place back.
        places.left = left;
        Ok(Ticket { ticket, orders: self.orders.clone() })
    }

    /// What the engine is doing, and has done, as of its last step.
    pub fn stats(&self) -> Stats {
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that were taken, or have a place, and are not over.
    pub fn under_way(&self) -> usize {
        self.shared.under_way.load(Ordering::Relaxed)
    }

    /// True unless the thread has ended or the last step failed.
    pub fn is_well(&self) -> bool {
        let runs = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        runs && !self.shared.failed.load(Ordering::Relaxed)
    }
}

/// What the thread owns.
struct Worker {
    engine: Engine,
    inbox: Receiver<Order>,
    shared: Arc<Shared>,
    requests: HashMap<RequestId, (u64, Sink)>,
    ids: HashMap<u64, RequestId>,
}

impl Worker {
    /// Works until nobody can send orders any more.
    fn work(mut self) {
        while self.take_orders() {
            match self.engine.step() {
                Ok(outputs) => {
                    self.shared.failed.store(false, Ordering::Relaxed);
                    // Whoever reads an answer to its end finds it counted.
                    self.publish();
                    outputs.into_iter().for_each(|(id, output)| self.give(id, output));
                }
                Err(error) => self.fail(&error),
            }
            self.publish();
        }
    }

    /// Takes what has come, and waits where there is nothing to do. False where nothing can come any more.
    fn take_orders(&mut self) -> bool {
        loop {
            let order = if self.engine.is_idle() {
                self.publish();
                self.inbox.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.inbox.try_recv()
            };
            match order {
                Ok(order) => self.take(order),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Submit { ticket, prompt, params, guide, mut sink } => {
                match self.engine.submit_guided(&prompt, params, guide) {
                    Ok(id) => {
                        self.ids.insert(ticket, id);
                        self.requests.insert(id, (ticket, sink));
                    }
                    Err(error) => {
                        self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
                        sink(Output::Failed(error));
                    }
                }
            }
            Order::Cancel { ticket } => {
                if let Some(id) = self.ids.get(&ticket).copied() {
                    self.engine.cancel(id);
                    self.forget(id);
                }
            }
        }
    }

    fn give(&mut self, id: RequestId, output: Output) {
        let is_over = matches!(output, Output::Finished(_) | Output::Failed(_));
        let Some((ticket, mut sink)) = self.requests.remove(&id) else { return };
        if is_over {
            self.ids.remove(&ticket);
            self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
            sink(output);
        } else {
            sink(output);
            self.requests.insert(id, (ticket, sink));
        }
    }

    fn forget(&mut self, id: RequestId) {
        if let Some((ticket, _)) = self.requests.remove(&id) {
            self.ids.remove(&ticket);
            self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// A step that failed ends all requests; a later one may succeed.
    fn fail(&mut self, error: &Error) {
        log::error!("a step failed, and with it {} requests: {error}", self.requests.len());
        self.shared.failed.store(true, Ordering::Relaxed);
        let ids: Vec<RequestId> = self.requests.keys().copied().collect();
        for id in ids {
            self.engine.cancel(id);
            self.give(id, Output::Failed(Error::device("engine", error.to_string())));
        }
    }

    fn publish(&self) {
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = self.engine.stats();
    }
}
