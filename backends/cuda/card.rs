//! An NVIDIA card as a device: modules, memory within a budget, and a CUDA graph a plan.

use std::collections::HashMap;

use quaver_core::op::{Copies, DeviceInfo, Fetch};
use quaver_core::{Error, Result};

use super::compiler::Compiler;
use super::device::{BOX_WIDTH, Device, Launch, Matrix};
use super::sys::{self, Blocks, Function, Graph, Module, Properties, Readback};
use super::tuning::{MOST_SPLITS, Tuning, Variant};

/// What the backend is called.
pub const NAME: &str = "cuda";

const NO_DRIVER: &str = "there is no NVIDIA driver (libcuda); install one, or take --backend wgpu or cpu";
const NO_CARD: &str = "the NVIDIA driver finds no card; see what nvidia-smi says, or take --backend wgpu or cpu";

/// The oldest CUDA whose drivers have all that is called: tensor maps came with 12.0.
const OLDEST_DRIVER: i32 = 12000;
/// The oldest CUDA whose drivers capture launches that start early ("Programmatic Dependent Launch", "Use in CUDA graphs").
const EARLY_DRIVER: i32 = 12030;
/// The oldest compute capability that kernels are written for.
const OLDEST_CARD: (u32, u32) = (8, 0);

/// The cards that can be opened, by their numbers, or why there are none.
pub fn all() -> Result<Vec<(usize, Properties)>, String> {
    let version = sys::driver_version().ok_or(NO_DRIVER)?.map_err(|why| match why.contains("NO_DEVICE") {
        true => NO_CARD.to_owned(),
        false => format!("the NVIDIA driver fails: {why}; take --backend wgpu or cpu"),
    })?;
    if version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(format!("the NVIDIA driver knows CUDA {major}.{minor}; update it to one that knows 12.0 or later"));
    }
    let mut cards = Vec::new();
    let mut older = Vec::new();
    for card in 0..sys::cards()? {
        let properties = sys::properties(card)?;
        match properties.capability >= OLDEST_CARD {
            true => cards.push((card, properties)),
            false => older.push(properties.name),
        }
    }
    match (cards.is_empty(), older.is_empty()) {
        (false, _) => Ok(cards),
        (true, true) => Err(NO_CARD.into()),
        (true, false) => Err(format!("{} is older than Ampere; take --backend wgpu", older.join(", "))),
    }
}

/// What a card is.
pub fn describe(Properties { name, capability, memory, .. }: &Properties) -> DeviceInfo {
    let cuda = sys::driver_version().and_then(Result::ok).unwrap_or_default();
    let (major, minor) = capability;
    DeviceInfo {
        backend: NAME,
        name: name.clone(),
        driver: format!("CUDA {}.{}, compute capability {major}.{minor}", cuda / 1000, cuda % 1000 / 10),
        memory: Some(*memory),
        native_fp8: *capability >= (8, 9),
        ..DeviceInfo::default()
    }
}

/// Bytes of a card's memory that are in use, by all that run on it.
pub fn memory_in_use(card: usize) -> Result<u64> {
    let used = sys::Card::open(card).and_then(|card| card.memory()).map(|(free, all)| all - free);
    used.map_err(|why| Error::device(NAME, why))
}

/// The variants of the kernels that a card runs, the best first.
pub fn variants(properties: &Properties) -> Vec<Variant> {
    match properties.capability {
        (9, 0) => vec![Variant::Sm90, Variant::Sm89, Variant::Sm80],
        capability if capability >= (8, 9) => vec![Variant::Sm89, Variant::Sm80],
        _ => vec![Variant::Sm80],
    }
}

/// A card that runs kernels.
pub struct Card {
    info: DeviceInfo,
    card: sys::Card,
    compiler: Compiler,
    /// Files, and whether their kernels wait for the one before (`dependency_wait`): code of sm_90a does, PTX does not.
    modules: HashMap<&'static str, (Module, bool)>,
    /// Entry points, and the most shared memory that each may be launched with.
    functions: HashMap<String, (Function, u32)>,
    /// True where a kernel that waits may start before the one ahead of it is done.
    starts_early: bool,
    graphs: Vec<Graph>,
    /// Memory for copies to the host: of those under way, and the rest.
    fetched: Copies<Readback>,
    readbacks: Vec<Readback>,
    /// Bytes that may still be allocated.
    budget: u64,
}

impl Card {
    /// Opens a card of [`all`], of whose memory a share may be used.
    pub fn open(card: usize, properties: &Properties, variant: Variant, share: f64) -> Result<(Self, Tuning)> {
        let info = DeviceInfo {
            native_fp8: variant != Variant::Sm80,
            variant: Some(variant.name()),
            tensor_cores: Some(variant.tensor_cores()),
            ..describe(properties)
        };
        let fail = |why| Error::device(format!("{NAME} ({})", info.name), why);
        let driver = sys::driver_version().and_then(Result::ok).unwrap_or_default();
        let compiler = Compiler::for_card(properties.capability, driver);
        let opened = sys::Card::open(card).map_err(fail)?;
        let (free, total) = opened.memory().map_err(fail)?;
        // What others have taken counts.
        let budget = ((total as f64 * share) as u64).saturating_sub(total - free);
        let tuning = Tuning { variant, processors: properties.processors, most_splits: MOST_SPLITS };
        let card = Card {
            info,
            card: opened,
            compiler,
            modules: HashMap::new(),
            functions: HashMap::new(),
            starts_early: properties.capability == (9, 0) && driver >= EARLY_DRIVER,
            graphs: Vec::new(),
            fetched: Copies::default(),
            readbacks: Vec::new(),
            budget,
        };
        Ok((card, tuning))
    }

    fn error(&self, why: impl Into<String>) -> Error {
        Error::device(format!("{NAME} ({})", self.info.name), why)
    }

    fn function(&mut self, launch: &Launch) -> Result<Function> {
        if let Some((function, most)) = self.functions.get(&launch.entry)
            && launch.shared <= *most
        {
            return Ok(*function);
        }
        if !self.modules.contains_key(launch.file) {
            let kernel = quaver_kernels::find(launch.file)
                .ok_or_else(|| self.error(format!("there is no kernel {}", launch.file)))?;
            let built = self.compiler.build(kernel)?;
            let module = self.card.load(&built.image).map_err(|why| {
                let path = built.path.display();
                self.error(format!("{} cannot be loaded ({why}); delete {path} to have it compiled anew", launch.file))
            })?;
            self.modules.insert(launch.file, (module, built.image.starts_with(b"\x7fELF")));
        }
        let function = self.card.function(&self.modules[launch.file].0, &launch.entry, launch.shared);
        let function = function.map_err(|why| self.error(format!("{}: {why}", launch.entry)))?;
        self.functions.insert(launch.entry.clone(), (function, launch.shared));
        Ok(function)
    }
}

impl Device for Card {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn budget(&self) -> Option<u64> {
        Some(self.budget)
    }

    fn alloc(&mut self, name: &str, bytes: u64) -> Result<u64> {
        let remedy = "lower --kv-cache-memory, --max-model-len or --max-num-batched-tokens, raise --gpu-memory-utilization, \
                      or take a card with more memory";
        let (what, have) = (format!("{name} on {}", self.info.name), self.budget);
        let refuse = |have| Error::OutOfMemory { what: what.clone(), need: bytes, have, remedy };
        if bytes > self.budget {
            return Err(refuse(have));
        }
        let address = self.card.alloc(bytes as usize).map_err(|why| match self.card.memory() {
            Ok((free, _)) if free < bytes => refuse(free),
            _ => self.error(why),
        })?;
        self.budget -= bytes;
        Ok(address)
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        self.card.write(address, bytes).map_err(|why| self.error(why))
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn fetch(&mut self, pieces: &[(u64, usize)]) -> Result<Fetch> {
        let bytes = pieces.iter().map(|(_, len)| len).sum();
        let found = self.readbacks.iter().position(|readback| readback.bytes() >= bytes);
        let readback = match found {
            Some(i) => self.readbacks.swap_remove(i),
            None => self.card.readback(bytes).map_err(|why| self.error(why))?,
        };
        self.card.fetch(&readback, pieces).map_err(|why| self.error(why))?;
        Ok(self.fetched.keep(readback))
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        let readback = self.fetched.take(&fetch).ok_or_else(|| self.error(format!("there is no copy {}", fetch.0)))?;
        self.card.take(&readback, into).map_err(|why| self.error(why))?;
        self.readbacks.push(readback);
        Ok(())
    }

    fn map(&self, &Matrix { address, width, rows, box_rows }: &Matrix) -> Result<Box<[u64; 16]>> {
        self.card.tensor_map(address, [width, rows], [BOX_WIDTH, box_rows]).map_err(|why| self.error(why))
    }

    fn prepare(&mut self, launches: Vec<Launch>) -> Result<usize> {
        let functions = launches.iter().map(|launch| self.function(launch)).collect::<Result<Vec<_>>>()?;
        let graph = self.card.capture(|capture| {
            launches.iter().zip(functions).enumerate().try_for_each(|(i, (launch, function))| {
                let args: Vec<_> = launch.args.iter().map(|arg| arg.words()).collect();
                let &Launch { grid, threads, shared, .. } = launch;
                // Nothing is ahead of the first.
                let is_early = self.starts_early && i > 0 && self.modules[launch.file].1;
                let launched = capture.launch(function, Blocks { grid, threads, shared }, is_early, &args);
                launched.map_err(|why| format!("{}: {why}", launch.entry))
            })
        });
        self.graphs.push(graph.map_err(|why| self.error(why))?);
        Ok(self.graphs.len() - 1)
    }

    fn run(&mut self, plan: usize) -> Result<()> {
        self.card.run(&self.graphs[plan]).map_err(|why| self.error(why))
    }
}
