//! What the integration tests share: the fixture checkpoints, Hugging Face's goldens, and a model to run them on.
#![allow(dead_code, reason = "every test file uses its own part")]

use std::collections::BTreeSet;

use libtest_mimic::Failed;
use quaver_backends::Kind;

pub mod checkpoints;
pub mod goldens;
pub mod mutate;
pub mod queued;
pub mod runner;
pub mod ties;
pub mod tiny;

/// Fails where tests of the wgpu backend would have nothing to run on: everywhere without an adapter, and on Linux, for
/// which `check.sh` installs both software drivers, without one of Vulkan and one of OpenGL.
pub fn adapters_are_there() -> Result<(), Failed> {
    let least = if cfg!(target_os = "linux") { 2 } else { 1 };
    let specs = quaver_backends::variants();
    let devices: BTreeSet<_> = specs.iter().filter(|spec| spec.kind == Kind::Wgpu).map(|spec| spec.device).collect();
    match devices.len() >= least {
        true => Ok(()),
        false => Err(format!("{} adapters are there, {least} are needed: run ./check.sh", devices.len()).into()),
    }
}
