//! `quaver synth`: a checkpoint with random weights, for benchmarks and tests.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use quaver::synth::{self, Scheme, Shape};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The folder to write; it must not exist yet.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Which model's sizes.
    #[arg(long, value_name = "SHAPE", default_value = "llama-3.2-1b")]
    shape: ShapeFlag,
    /// How the linears are kept.
    #[arg(long, value_name = "SCHEME", default_value = "fp8-channel")]
    scheme: SchemeFlag,
    /// The same seed gives the same weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ShapeFlag {
    #[value(name = "llama-3.2-1b")]
    Llama32_1b,
    Tiny,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SchemeFlag {
    Bf16,
    Fp8,
    Fp8Channel,
    Fp8Dynamic,
}

pub fn run(args: Args) -> Result<()> {
    let shape = match args.shape {
        ShapeFlag::Llama32_1b => Shape::LLAMA_3_2_1B,
        ShapeFlag::Tiny => Shape::TINY,
    };
    let scheme = match args.scheme {
        SchemeFlag::Bf16 => Scheme::Bf16,
        SchemeFlag::Fp8 => Scheme::Fp8,
        SchemeFlag::Fp8Channel => Scheme::Fp8Channel,
        SchemeFlag::Fp8Dynamic => Scheme::Fp8Dynamic,
    };
    Ok(synth::write(&args.folder, &shape, scheme, args.seed)?)
}
