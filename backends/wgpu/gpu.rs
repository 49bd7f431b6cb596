//! A device and its queue. Whatever goes wrong on it (validation, memory, loss of the device) becomes an ordinary error
//! that names adapter and driver. A device that is lost stays so: every later call fails with the same reason.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ::wgpu::{
    Adapter, Buffer, BufferDescriptor, BufferUsages, Device, DeviceDescriptor, Features, MapMode, MemoryHints,
    PollError, PollType, Queue, SubmissionIndex, Trace,
};
use quaver_core::op::DeviceInfo;
use quaver_core::{Error, Result};

use super::adapter;
use super::pipelines::experimental;

/// See the module.
pub struct Gpu {
    pub info: DeviceInfo,
    pub device: Device,
    pub queue: Queue,
    /// What went wrong first, since it was last asked for.
    fault: Arc<Mutex<Option<String>>>,
    /// Why the device is lost, once it is.
    lost: Arc<OnceLock<String>>,
    /// Where results are read from, and nothing is under way.
    readbacks: Vec<Buffer>,
}

/// A copy to the host that is under way.
pub struct Readback {
    buffer: Buffer,
    bytes: u64,
    submission: SubmissionIndex,
}

impl Gpu {
    /// Opens an adapter with all that it allows.
    pub fn open(adapter: &Adapter, features: Features) -> Result<Self> {
        let info = adapter::describe(adapter);
        let descriptor = DeviceDescriptor {
            label: Some("quaver"),
            required_features: features,
            required_limits: adapter.limits(),
            experimental_features: experimental(features),
            memory_hints: MemoryHints::Performance,
            trace: Trace::Off,
        };
        let opened = pollster::block_on(adapter.request_device(&descriptor));
        let (device, queue) = opened.map_err(|e| Error::device(name(&info), format!("cannot be opened: {e}")))?;
        let (fault, lost) = (Arc::new(Mutex::new(None)), Arc::new(OnceLock::new()));
        let (on_error, on_loss) = (fault.clone(), lost.clone());
        device.on_uncaptured_error(Arc::new(move |error: ::wgpu::Error| note(&on_error, explain(&error))));
        device.set_device_lost_callback(move |reason, message| lose(&on_loss, &format!("{reason:?}: {message}")));
        Ok(Gpu { info, device, queue, fault, lost, readbacks: Vec::new() })
    }

    /// An error that names adapter and driver.
    pub fn error(&self, why: impl Into<String>) -> Error {
        Error::device(name(&self.info), why)
    }

    /// Fails with what went wrong since the last call, and for ever once the device is lost.
    pub fn check(&self) -> Result<()> {
        if let Some(why) = self.lost.get() {
            return Err(self.error(why.clone()));
        }
        match self.fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(why) => Err(self.error(why)),
            None => Ok(()),
        }
    }

    /// A zeroed buffer.
    pub fn buffer(&self, label: &str, size: u64, usage: BufferUsages) -> Result<Buffer> {
        let size = size.next_multiple_of(4).max(16);
        let descriptor = BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        let buffer = self.device.create_buffer(&descriptor);
        self.is_there()?;
        Ok(buffer)
    }

    /// [`Gpu::check`] behind a look at the device: wgpu takes what is submitted to a device that was lost in silence.
    pub fn is_there(&self) -> Result<()> {
        self.poll(PollType::Poll).map_err(|e| self.error(e.to_string()))?;
        self.check()
    }

    /// Waits until all that was submitted is done.
    pub fn wait(&self) -> Result<()> {
        self.wait_for(None)
    }

    /// Waits for a submission, or for all of them. A second at a time, since OpenGL cuts longer waits short.
    fn wait_for(&self, submission: Option<SubmissionIndex>) -> Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < LONGEST_WAIT {
            let timeout = Some(Duration::from_secs(1));
            match self.poll(PollType::Wait { submission_index: submission.clone(), timeout }) {
                Err(PollError::Timeout) => self.check()?,
                Err(e) => {
                    self.check()?;
                    return Err(self.error(e.to_string()));
                }
                Ok(()) => return self.check(),
            }
        }
        let minutes = LONGEST_WAIT.as_secs() / 60;
        Err(self.error(format!("not done after {minutes} minutes: it hangs; start again, or take --backend cpu")))
    }

    /// Looks at the device, which wgpu panics at where it finds it lost: that becomes what every call fails with.
    fn poll(&self, how: PollType) -> std::result::Result<(), PollError> {
        // What wgpu leaves behind when it panics is not used any more: every call fails from then on.
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(how)));
        polled.map(|polled| polled.map(|_| ())).unwrap_or_else(|panic| {
            lose(&self.lost, panic.downcast_ref::<String>().map_or("it cannot be waited for", String::as_str));
            Ok(())
        })
    }

    /// Queues a copy of ranges of buffers, one behind the other, to the host; offsets and lengths are multiples of 4.
    pub fn fetch(&mut self, pieces: &[(&Buffer, Range<u64>)]) -> Result<Readback> {
        self.is_there()?;
        let bytes = pieces.iter().map(|(_, range)| range.end - range.start).sum();
        let found = self.readbacks.iter().position(|buffer| buffer.size() >= bytes);
        let buffer = match found {
            Some(i) => self.readbacks.swap_remove(i),
            None => {
                // One that is too small is in nobody's way any more.
                self.readbacks.pop();
                self.buffer("readback", bytes, BufferUsages::COPY_DST | BufferUsages::MAP_READ)?
            }
        };
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for (from, range) in pieces {
            let len = range.end - range.start;
            encoder.copy_buffer_to_buffer(from, range.start, &buffer, at, len);
            at += len;
        }
        let submission = self.queue.submit([encoder.finish()]);
        if bytes > 0 {
            buffer.map_async(MapMode::Read, 0..bytes, |_| ());
        }
        self.check()?;
        Ok(Readback { buffer, bytes, submission })
    }

    /// Waits for a copy, and gives its bytes to `take`.
    pub fn take(&mut self, readback: Readback, take: impl FnOnce(&[u8])) -> Result<()> {
        let Readback { buffer, bytes, submission } = readback;
        self.wait_for(Some(submission))?;
        if bytes > 0 {
            let view = buffer.get_mapped_range(0..bytes).map_err(|e| self.error(e.to_string()))?;
            take(&view);
            drop(view);
            buffer.unmap();
        }
        self.readbacks.push(buffer);
        self.check()
    }

    /// The two together, of one range.
    pub fn read(&mut self, from: &Buffer, range: Range<u64>, take: impl FnOnce(&[u8])) -> Result<()> {
        let readback = self.fetch(&[(from, range)])?;
        self.take(readback, take)
    }
}

/// How long a submission may take: longer than any step of a software adapter, which has some 10 G operations a second.
/// Drivers of hardware give up a GPU that hangs after seconds, and then it is lost.
const LONGEST_WAIT: Duration = Duration::from_secs(60 * 60);

fn name(info: &DeviceInfo) -> String {
    format!("{} ({}, {})", info.backend, info.name, info.driver)
}

fn note(fault: &Mutex<Option<String>>, why: String) {
    fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
}

fn lose(lost: &OnceLock<String>, why: &str) {
    lost.get_or_init(|| one_line(&format!("the device was lost ({why}); start again, or take --backend cpu")));
}

fn explain(error: &::wgpu::Error) -> String {
    match error {
        ::wgpu::Error::OutOfMemory { .. } => {
            "out of device memory; lower --kv-cache-memory, --max-model-len, --max-num-seqs or \
             --max-num-batched-tokens"
                .into()
        }
        error => one_line(&error.to_string()),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
