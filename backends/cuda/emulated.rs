//! The emulator as a device: the kernels, compiled by the machine's C++ compiler, in a process of their own
//! (`kernels/emulator`). Its program is compiled once and kept in the cache folder, under a name that its sources give it.

use std::fs;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use quaver_core::op::{Copies, DeviceInfo, Fetch};
use quaver_core::{Error, Result};
use quaver_kernels::{EMULATOR_CPP, EMULATOR_H};

use super::cache;
use super::device::{BOX_WIDTH, Device, Launch, Matrix};
use super::tuning::Variant;

const NAME: &str = "cuda-emulated";

/// What `emulator.h` asks of a compiler: f32 as it is written; and for which cards.
const fn flags(variant: Variant) -> [&'static str; 5] {
    let cards = match variant {
        Variant::Sm80 => "-DQUAVER_EMULATED=800",
        Variant::Sm89 | Variant::Sm90 => "-DQUAVER_EMULATED=900",
    };
    ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", cards]
}

/// A process that runs kernels.
pub struct Emulator {
    info: DeviceInfo,
    process: Child,
    commands: BufWriter<ChildStdin>,
    answers: BufReader<ChildStdout>,
    plans: Vec<Vec<Launch>>,
    /// Copies that were not taken yet.
    fetched: Copies<Vec<u8>>,
}

impl Emulator {
    /// Starts an emulator that was built.
    pub fn start(program: &Path, variant: Variant, schedule: u64) -> Result<Self> {
        let piped = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut process = piped.map_err(|e| Error::io("start", program, e))?;
        let (stdin, stdout) = (process.stdin.take().expect("piped"), process.stdout.take().expect("piped"));
        let info = DeviceInfo {
            backend: NAME,
            name: format!("{} on the CPU", variant.name()),
            driver: format!("schedule {schedule}"),
            memory: None,
            native_fp8: false,
            variant: Some(variant.name()),
            tensor_cores: Some(variant.tensor_cores()),
        };
        let (commands, answers) = (BufWriter::new(stdin), BufReader::new(stdout));
        let (plans, fetched) = (Vec::new(), Copies::default());
        let mut emulator = Emulator { info, process, commands, answers, plans, fetched };
        emulator.command(b's', &[schedule]).map_err(|e| emulator.failure(&e))?;
        Ok(emulator)
    }

    fn command(&mut self, command: u8, words: &[u64]) -> io::Result<()> {
        self.commands.write_all(&[command])?;
        words.iter().try_for_each(|word| self.commands.write_all(&word.to_ne_bytes()))
    }

    fn answer(&mut self) -> io::Result<u64> {
        self.commands.flush()?;
        let mut word = [0; 8];
        self.answers.read_exact(&mut word)?;
        Ok(u64::from_ne_bytes(word))
    }

    fn launch(&mut self, launch: &Launch) -> io::Result<()> {
        self.command(b'l', &[launch.entry.len() as u64])?;
        self.commands.write_all(launch.entry.as_bytes())?;
        let [x, y, z] = launch.grid;
        let shared = [launch.shared, most_shared(launch.file)];
        let words = [x, y, z, launch.threads, 1, 1, shared[0], shared[1], launch.args.len() as u32].map(u64::from);
        for word in words.iter().copied().chain(launch.args.iter().flat_map(|arg| {
            let words = arg.words();
            std::iter::once(words.len() as u64).chain(words.iter().copied())
        })) {
            self.commands.write_all(&word.to_ne_bytes())?;
        }
        self.answer().map(drop)
    }

    /// What the process said before it ended.
    fn failure(&mut self, error: &io::Error) -> Error {
        let mut said = String::new();
        if let Some(stderr) = &mut self.process.stderr {
            // Where nothing can be read, the error itself is all there is.
            let _ = stderr.read_to_string(&mut said);
        }
        let said = said.trim();
        Error::device(NAME, if said.is_empty() { format!("the emulator failed: {error}") } else { said.to_owned() })
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Device for Emulator {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn budget(&self) -> Option<u64> {
        None
    }

    fn alloc(&mut self, _name: &str, bytes: u64) -> Result<u64> {
        self.command(b'a', &[bytes]).and_then(|()| self.answer()).map_err(|e| self.failure(&e))
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        let written = self.command(b'w', &[address, bytes.len() as u64]).and_then(|()| self.commands.write_all(bytes));
        written.map_err(|e| self.failure(&e))
    }

    fn is_asynchronous(&self) -> bool {
        false
    }

    fn fetch(&mut self, pieces: &[(u64, usize)]) -> Result<Fetch> {
        let mut bytes = vec![0; pieces.iter().map(|(_, len)| len).sum()];
        let mut rest = &mut bytes[..];
        for &(address, len) in pieces {
            let into = rest.split_off_mut(..len).expect("as long as all pieces");
            let asked = self.command(b'r', &[address, len as u64]).and_then(|()| self.commands.flush());
            asked.and_then(|()| self.answers.read_exact(into)).map_err(|e| self.failure(&e))?;
        }
        Ok(self.fetched.keep(bytes))
    }

    fn take(&mut self, fetch: Fetch, into: &mut [u8]) -> Result<()> {
        let bytes = self.fetched.take(&fetch).filter(|bytes| bytes.len() == into.len());
        let none = || Error::device(NAME, format!("there is no copy {} of {} bytes", fetch.0, into.len()));
        into.copy_from_slice(&bytes.ok_or_else(none)?);
        Ok(())
    }

    fn map(&self, matrix: &Matrix) -> Result<Box<[u64; 16]>> {
        // `emulator::Map`: base, pitch, (width, height), (box width, box height).
        let &Matrix { address, width, rows, box_rows } = matrix;
        let mut words = Box::new([0; 16]);
        words[..4].copy_from_slice(&[
            address,
            width,
            width | rows << 32,
            u64::from(BOX_WIDTH) | u64::from(box_rows) << 32,
        ]);
        Ok(words)
    }

    fn prepare(&mut self, launches: Vec<Launch>) -> Result<usize> {
        self.plans.push(launches);
        Ok(self.plans.len() - 1)
    }

    fn run(&mut self, plan: usize) -> Result<()> {
        let launches = std::mem::take(&mut self.plans[plan]);
        let ran = launches.iter().try_for_each(|launch| self.launch(launch));
        self.plans[plan] = launches;
        ran.map_err(|e| self.failure(&e))
    }
}

/// Bytes of shared memory that a block may have on every card that a kernel file is written for. Those of 8.6, 8.9 and 12.0
/// have the least (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
fn most_shared(file: &str) -> u32 {
    match quaver_kernels::find(file) {
        Some(kernel) if kernel.targets == ["sm_90a"] => 227 << 10,
        _ => 99 << 10,
    }
}

/// The emulator with these kernels, (name, source), for the cards of a variant: from the cache, or compiled.
pub fn build(kernels: &[(&str, String)], variant: Variant) -> Result<PathBuf> {
    // Tests that run side by side compile it once.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let texts = kernels.iter().flat_map(|(name, source)| [*name, source.as_str()]);
    let key = cache::key([EMULATOR_H, EMULATOR_CPP, &compiler].into_iter().chain(flags(variant)).chain(texts));
    let program = cache::folder()?.join(format!("emulator-{key}"));
    if program.is_file() {
        return Ok(program);
    }
    let work = program.with_extension(format!("{}.tmp", std::process::id()));
    let built = compile(&compiler, flags(variant), kernels, &work).and_then(|()| {
        let made = work.join("emulator");
        fs::rename(&made, &program).map_err(|e| Error::io("write", &program, e))
    });
    // What is left of it helps nobody.
    let _ = fs::remove_dir_all(&work);
    built.map(|()| program)
}

/// Compiles `emulator` in a folder: a process a file, as many at a time as there are cores.
fn compile(compiler: &str, flags: [&str; 5], kernels: &[(&str, String)], folder: &Path) -> Result<()> {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|e| Error::io("write", path, e))
    };
    fs::create_dir_all(folder).map_err(|e| Error::io("write", folder, e))?;
    write("emulator.h", EMULATOR_H)?;
    write("emulator.cpp", EMULATOR_CPP)?;
    kernels.iter().try_for_each(|(name, source)| write(&format!("{name}.cpp"), source))?;
    let run = |args: &[String]| {
        let command = Command::new(compiler).args(flags).args(args).current_dir(folder).output();
        let missing = format!("{compiler} cannot be started; install a C++ compiler (Debian, Ubuntu: g++), or set CXX");
        let output = command.map_err(|e| Error::device(NAME, format!("{missing}: {e}")))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(Error::device(NAME, String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        }
    };
    let names: Vec<&str> = std::iter::once("emulator").chain(kernels.iter().map(|(name, _)| *name)).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let worker = || {
        let take = || names.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        std::iter::from_fn(take).try_for_each(|name| run(&["-c".to_owned(), format!("{name}.cpp")]))
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no compile panics"))
    })?;
    let objects = names.iter().map(|name| format!("{name}.o"));
    run(&objects.chain(["-o".to_owned(), "emulator".to_owned()]).collect::<Vec<_>>())
}
