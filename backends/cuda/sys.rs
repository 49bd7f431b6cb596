//! The CUDA driver and NVRTC as safe functions: the one file of this backend with unsafe code. Both are libraries that a
//! machine may lack, so that nothing is called before they were found: [`driver_version`] and [`load_nvrtc`] come first,
//! and every other function is behind a value that only they lead to.
//!
//! What kernels do with the addresses that they are given is out of Rust's sight. `lower.rs` gives them buffers whose sizes
//! `Program::check` has compared, the emulator runs the same sources with a guard behind every buffer, and no address is
//! ever freed while its card is open.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::result::{self as driver, DriverError};
use cudarc::driver::sys as cu;
use cudarc::nvrtc::{result as nvrtc, sys as rtc};
use libloading::Library;

/// What went wrong, in the library's words.
pub type Result<T, E = String> = std::result::Result<T, E>;

fn say(error: DriverError) -> String {
    let text = |text: Result<&CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(why)) => format!("{name}: {why}"),
        _ => format!("error {}", error.0 as u32),
    }
}

/// The version of CUDA that the driver knows, 12040 for 12.4; None where there is no driver. Starts it.
pub fn driver_version() -> Option<Result<i32>> {
    // SAFETY: loading the driver's library runs its initializers, which are made for that.
    static IS_THERE: OnceLock<bool> = OnceLock::new();
    if !*IS_THERE.get_or_init(|| unsafe { cu::is_culib_present() }) {
        return None;
    }
    let mut version = 0;
    // SAFETY: the library is there, and the pointer is that of a number.
    let asked = unsafe { cu::cuDriverGetVersion(&mut version) }.result();
    Some(asked.and_then(|()| driver::init()).map(|()| version).map_err(say))
}

/// How many cards there are; after [`driver_version`] gave a version.
pub fn cards() -> Result<usize> {
    driver::device::get_count().map(|count| count as usize).map_err(say)
}

/// What a card is, without taking it.
#[derive(Clone, Debug)]
pub struct Properties {
    /// What the driver calls it.
    pub name: String,
    /// Major and minor.
    pub capability: (u32, u32),
    /// Bytes.
    pub memory: u64,
    /// Multiprocessors.
    pub processors: u32,
}

/// After [`driver_version`] gave a version; of a card below [`cards`].
pub fn properties(card: usize) -> Result<Properties> {
    use cu::CUdevice_attribute as Attribute;
    let device = driver::device::get(card as c_int).map_err(say)?;
    // SAFETY: `device` is what the driver just gave.
    let number = |attribute| unsafe { driver::device::get_attribute(device, attribute) };
    let properties = || -> Result<Properties, DriverError> {
        let major = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: as above.
        let memory = unsafe { driver::device::total_mem(device) }?;
        Ok(Properties {
            name: driver::device::get_name(device)?,
            capability: (major as u32, minor as u32),
            memory: memory as u64,
            processors: processors as u32,
        })
    };
    properties().map_err(say)
}

/// A card with a stream on it. Dropping it frees its memory; the driver's context stays until the process ends.
pub struct Card {
    context: cu::CUcontext,
    stream: cu::CUstream,
    /// The addresses of all memory.
    memory: Vec<u64>,
    /// Pinned memory of the host, and the event behind the last copy to it.
    pinned: Vec<(*mut c_void, cu::CUevent)>,
}

// SAFETY: the driver's handles may be used from any thread; what is a thread's own, the current context, is set by every
// function before it calls anything else.
unsafe impl Send for Card {}

/// An entry point of a module that is loaded.
#[derive(Clone, Copy)]
pub struct Function(cu::CUfunction);

// SAFETY: as for `Card`, without which it cannot be launched.
unsafe impl Send for Function {}

/// Pinned memory of the host that copies go to, and the event behind the last of them.
pub struct Readback {
    memory: *mut u8,
    bytes: usize,
    done: cu::CUevent,
}

// SAFETY: as for `Card`, without which nobody can look at the memory.
unsafe impl Send for Readback {}

impl Readback {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Launches that were captured.
pub struct Graph(cu::CUgraphExec);

// SAFETY: as for `Card`, without which it cannot be run.
unsafe impl Send for Graph {}

impl Card {
    /// Opens a card; after [`driver_version`] gave a version.
    pub fn open(card: usize) -> Result<Self> {
        let device = driver::device::get(card as c_int).map_err(say)?;
        // SAFETY: `device` is what the driver just gave; the context is kept, and never released.
        let context = unsafe { driver::primary_ctx::retain(device) }.map_err(say)?;
        let mut opened = Card { context, stream: ptr::null_mut(), memory: Vec::new(), pinned: Vec::new() };
        opened.enter()?;
        opened.stream = driver::stream::create(driver::stream::StreamKind::NonBlocking).map_err(say)?;
        Ok(opened)
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as the process lives.
        unsafe { driver::ctx::set_current(self.context) }.map_err(say)
    }

    /// Bytes of memory that are free, and all of them.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        driver::mem_get_info().map(|(free, all)| (free as u64, all as u64)).map_err(say)
    }

    /// Zeroed memory, aligned to 256 bytes, for as long as the card is open.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: the memory is new, as long as what is cleared, and nothing else knows its address yet.
        unsafe {
            let address = driver::malloc_sync(bytes).map_err(say)?;
            self.memory.push(address);
            driver::memset_d8_async(address, 0, bytes, self.stream).map_err(say)?;
            Ok(address)
        }
    }

    /// Queues a copy to `address`, an address of [`Card::alloc`] with at least so many bytes behind it. The driver stages
    /// pageable memory before it returns.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: `memory.rs` has compared the range with the buffer's size.
        unsafe { driver::memcpy_htod_async(address, bytes, self.stream) }.map_err(say)
    }

    /// Memory of the host for copies of so many bytes, for as long as the card is open.
    pub fn readback(&mut self, bytes: usize) -> Result<Readback> {
        self.enter()?;
        // SAFETY: both are new, and freed when the card is dropped alone.
        let memory = unsafe { driver::malloc_host(bytes.max(1), 0) }.map_err(say)?;
        let done = driver::event::create(cu::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(say)?;
        self.pinned.push((memory, done));
        Ok(Readback { memory: memory.cast(), bytes, done })
    }

    /// Queues copies of (address, bytes) to `into`, one behind the other; addresses as [`Card::write`] says.
    pub fn fetch(&self, into: &Readback, pieces: &[(u64, usize)]) -> Result<()> {
        self.enter()?;
        let mut at = 0;
        for &(address, len) in pieces {
            if at + len > into.bytes {
                return Err(format!("copies of {} bytes and more do not fit {}", at + len, into.bytes));
            }
            // SAFETY: the memory is this card's own and as long as was just compared; nobody else looks at it until
            // `take` has waited. `memory.rs` has compared the range with the buffer's size.
            unsafe {
                let to = std::slice::from_raw_parts_mut(into.memory.add(at), len);
                driver::memcpy_dtoh_async(to, address, self.stream).map_err(say)?;
            }
            at += len;
        }
        // SAFETY: event and stream are this card's own.
        unsafe { driver::event::record(into.done, self.stream) }.map_err(say)
    }

    /// Waits for the copies of [`Card::fetch`], and for nothing behind them.
    pub fn take(&self, from: &Readback, into: &mut [u8]) -> Result<()> {
        self.enter()?;
        if into.len() > from.bytes {
            return Err(format!("{} bytes were asked for, {} were copied", into.len(), from.bytes));
        }
        // SAFETY: the event is this card's own; behind it nothing writes to the memory, which is as long as was compared.
        unsafe {
            driver::event::synchronize(from.done).map_err(say)?;
            into.copy_from_slice(std::slice::from_raw_parts(from.memory, into.len()));
        }
        Ok(())
    }

    /// Loads a module: a cubin, or PTX with a zero behind it.
    pub fn load(&self, image: &[u8]) -> Result<Module> {
        self.enter()?;
        // A PTX text ends with its zero; one more does no harm to a cubin, which says how long it is.
        let image = [image, &[0]].concat();
        // SAFETY: the image is whole: it comes from NVRTC, or from a file that was written whole.
        let module = unsafe { driver::module::load_data(image.as_ptr().cast()) }.map_err(say)?;
        Ok(Module(module))
    }

    /// An entry point that may be launched with so much shared memory.
    pub fn function(&self, module: &Module, name: &str, shared: u32) -> Result<Function> {
        self.enter()?;
        let name = CString::new(name).map_err(|e| e.to_string())?;
        // SAFETY: modules are never unloaded.
        unsafe {
            let function = driver::module::get_function(module.0, name).map_err(say)?;
            let most = cu::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            driver::function::set_function_attribute(function, most, shared as c_int).map_err(say)?;
            Ok(Function(function))
        }
    }

    /// The tensor map of a matrix of bytes: boxes of `box_rows` rows of `box_width` bytes, swizzled by 128 bytes; what lies
    /// outside is zero.
    pub fn tensor_map(&self, address: u64, [width, rows]: [u64; 2], boxes: [u32; 2]) -> Result<Box<[u64; 16]>> {
        self.enter()?;
        let mut map = cu::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the lists have as many elements as the rank asks for, and live until the call returns.
        let made = unsafe {
            cu::cuTensorMapEncodeTiled(
                &mut map,
                cu::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2,
                address as *mut c_void,
                [width, rows].as_ptr(),
                [width].as_ptr(),
                boxes.as_ptr(),
                [1; 2].as_ptr(),
                cu::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                cu::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                cu::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                cu::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().map_err(say)?;
        Ok(Box::new(map.opaque))
    }

    /// Captures what `launch` launches as one graph.
    pub fn capture(&self, launch: impl FnOnce(&Capture) -> Result<()>) -> Result<Graph> {
        self.enter()?;
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this card's own and captures nothing else; the graph is destroyed once it was made
        // executable.
        unsafe {
            driver::stream::begin_capture(self.stream, mode).map_err(say)?;
            let launched = launch(&Capture(self));
            // Ends the capture even where a launch failed.
            let graph = driver::stream::end_capture(self.stream).map_err(say);
            launched?;
            let graph = graph?;
            let made = driver::graph::instantiate(graph, cu::CUgraphInstantiate_flags(0));
            driver::graph::destroy(graph).map_err(say)?;
            made.map(Graph).map_err(say)
        }
    }

    /// Queues a graph.
    pub fn run(&self, graph: &Graph) -> Result<()> {
        self.enter()?;
        // SAFETY: graphs are never destroyed.
        unsafe { driver::graph::launch(graph.0, self.stream) }.map_err(say)
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // Nobody is left to be told of an error: what the driver does not free now it frees with the process.
        if self.enter().is_err() {
            return;
        }
        // SAFETY: addresses and stream are this card's own, nothing is queued any more, and graphs, which know the
        // addresses, are run by a card only.
        unsafe {
            if self.stream.is_null() || driver::stream::synchronize(self.stream).is_err() {
                return;
            }
            for address in self.memory.drain(..) {
                let _ = driver::free_sync(address);
            }
            for (memory, done) in self.pinned.drain(..) {
                let _ = driver::free_host(memory);
                let _ = driver::event::destroy(done);
            }
            let _ = driver::stream::destroy(self.stream);
        }
    }
}

/// A module that is loaded; it stays until the process ends.
pub struct Module(cu::CUmodule);

// SAFETY: as for `Card`, without which nothing can be had from it.
unsafe impl Send for Module {}

/// How many blocks a launch has, along each dimension, of how many threads and bytes of shared memory.
#[derive(Clone, Copy)]
pub struct Blocks {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

/// A capture under way.
pub struct Capture<'a>(&'a Card);

impl Capture<'_> {
    /// Adds a launch; one that `is_early` may start before the kernel ahead of it is done, and waits for it by itself. Each
    /// argument is the words that its value begins with.
    pub fn launch(&self, function: Function, blocks: Blocks, is_early: bool, args: &[&[u64]]) -> Result<()> {
        let mut args: Vec<*mut c_void> = args.iter().map(|words| words.as_ptr().cast_mut().cast()).collect();
        let Blocks { grid: [x, y, z], threads, shared } = blocks;
        let mut early = cu::CUlaunchAttribute {
            id: cu::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: cu::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = cu::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: self.0.stream,
            attrs: &mut early,
            numAttrs: c_uint::from(is_early),
        };
        // SAFETY: the arguments are those that the entry point takes, in number and size: the emulator refuses others.
        // The driver copies them, and what the config points to, before it returns.
        unsafe { cu::cuLaunchKernelEx(&config, function.0, args.as_mut_ptr(), ptr::null_mut()) }.result().map_err(say)
    }
}

/// NVRTC, the compiler.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc {
    /// Major and minor.
    pub version: (i32, i32),
}

/// Finds NVRTC: from `homes`, whose files are loaded in their order, or where the system's loader looks; where it `must`, from
/// the first of `homes`. None where it is nowhere.
pub fn load_nvrtc(homes: &[Vec<PathBuf>], must: bool) -> Result<Option<Nvrtc>> {
    static FOUND: OnceLock<Result<Option<Nvrtc>>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: loading a library runs its initializers; these are NVIDIA's, and made for that.
        let load = |file: &PathBuf| unsafe { Library::new(file) };
        for files in homes {
            match files.iter().map(load).collect::<Result<Vec<Library>, _>>() {
                Ok(libraries) => {
                    // They stay, so that a search by name finds them.
                    libraries.into_iter().for_each(std::mem::forget);
                    break;
                }
                Err(why) if must => return Err(format!("NVRTC cannot be loaded: {why}; see what QUAVER_NVRTC names")),
                Err(_) => (),
            }
        }
        let mut version = (0, 0);
        // SAFETY: the version is asked for where the library is there, with pointers to numbers.
        unsafe {
            if !rtc::is_culib_present() || rtc::nvrtcVersion(&mut version.0, &mut version.1).result().is_err() {
                return Ok(None);
            }
        }
        Ok(Some(Nvrtc { version }))
    });
    found.clone()
}

/// What NVRTC made of a source.
pub struct Compiled {
    /// A cubin for a real architecture, PTX for a virtual one.
    pub image: Vec<u8>,
    /// What the compiler and the assembler said.
    pub log: String,
}

impl Nvrtc {
    /// The real architectures that it compiles for, 90 for sm_90.
    pub fn architectures(self) -> Vec<i32> {
        let mut count = 0;
        // SAFETY: the list is as long as the first call says.
        unsafe {
            if rtc::nvrtcGetNumSupportedArchs(&mut count).result().is_err() {
                return Vec::new();
            }
            let mut list = vec![0; count as usize];
            match rtc::nvrtcGetSupportedArchs(list.as_mut_ptr()).result() {
                Ok(()) => list,
                Err(_) => Vec::new(),
            }
        }
    }

    /// Compiles a source; where that fails, gives the compiler's log.
    pub fn compile(self, name: &str, source: &str, options: &[&str]) -> Result<Compiled> {
        let text = |text: &str| CString::new(text).map_err(|e| e.to_string());
        let (source, name) = (text(source)?, text(name)?);
        let is_ptx = options.iter().any(|option| option.contains("=compute_"));
        let mut program = nvrtc::create_program(&source, Some(&name)).map_err(|e| format!("{e:?}"))?;
        // SAFETY: the program was just made, is destroyed once, at the end, and `source` and `name` outlive it; buffers are
        // as long as the library says.
        unsafe {
            let done = nvrtc::compile_program(program, options);
            let log = nvrtc::get_program_log(program).map(|log| log.iter().map(|&c| c as u8).collect::<Vec<_>>());
            let log = String::from_utf8_lossy(&log.unwrap_or_default()).trim_end_matches('\0').trim().to_owned();
            let mut image = Vec::new();
            let got = done.and_then(|()| {
                let mut size = 0;
                let ask = if is_ptx { rtc::nvrtcGetPTXSize } else { rtc::nvrtcGetCUBINSize };
                ask(program, &mut size).result()?;
                image.resize(size, 0);
                let take = if is_ptx { rtc::nvrtcGetPTX } else { rtc::nvrtcGetCUBIN };
                take(program, image.as_mut_ptr().cast()).result()
            });
            // Nothing depends on whether it could be freed.
            let _ = rtc::nvrtcDestroyProgram(&mut program);
            got.map(|()| Compiled { image, log: log.clone() }).map_err(|e| format!("{e:?}: {log}"))
        }
    }
}
