//! What runs launches: a card, or the emulator.

use quaver_core::Result;
use quaver_core::op::{DeviceInfo, Fetch};

/// A launch whose arguments are known.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The file, as `quaver_kernels` names it.
    pub file: &'static str,
    pub entry: String,
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
    pub args: Vec<Value>,
}

/// An argument as the device takes it.
#[derive(Clone, Debug)]
pub enum Value {
    /// An address, or a number in the lower half.
    Word(u64),
    /// A tensor map.
    Map(Box<[u64; 16]>),
}

impl Value {
    /// Its words.
    pub fn words(&self) -> &[u64] {
        match self {
            Value::Word(word) => std::slice::from_ref(word),
            Value::Map(map) => &map[..],
        }
    }
}

/// A matrix of bytes on the device, and the boxes that kernels copy from it.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub address: u64,
    /// Bytes a row.
    pub width: u64,
    pub rows: u64,
    pub box_rows: u32,
}

/// Bytes of a row of a box: what one swizzle covers.
pub const BOX_WIDTH: u32 = 128;

/// See the module.
pub trait Device: Send {
    fn info(&self) -> &DeviceInfo;

    /// Bytes that may still be allocated, where there is a limit.
    fn budget(&self) -> Option<u64>;

    /// Zeroed memory; an address that is a multiple of 16.
    fn alloc(&mut self, name: &str, bytes: u64) -> Result<u64>;

    /// Writes before whatever is queued after.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()>;

    /// True where [`Device::run`] returns before the work is done.
    fn is_asynchronous(&self) -> bool;

    /// Queues copies of (address, bytes), one behind the other, to the host.
    fn fetch(&mut self, pieces: &[(u64, usize)]) -> Result<Fetch>;

    /// Waits for what [`Device::fetch`] queued; `into` is as long as the pieces are together.
    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()>;

    /// The tensor map of a matrix.
    fn map(&self, matrix: &Matrix) -> Result<Box<[u64; 16]>>;

    /// Prepares launches that run one after the other; numbers them from 0.
    fn prepare(&mut self, launches: Vec<Launch>) -> Result<usize>;

    /// Queues them; does not wait.
    fn run(&mut self, plan: usize) -> Result<()>;
}
