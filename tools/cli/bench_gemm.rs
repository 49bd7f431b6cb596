//! `quaver bench gemm`: the matrix products of a model by themselves.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Result;
use quaver::bench::History;
use quaver::bench::gemm::{self, LLAMA_1B};
use quaver::core::op::DType;

use super::bench::{figures, progress};
use super::flags::DeviceFlags;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    device: DeviceFlags,
    /// Rows of the products: few as when sequences decode, many as in their prompts.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,8,64,256,2048,8192",
        value_parser = clap::value_parser!(u32).range(1..=65536))]
    rows: Vec<u32>,
    /// Projections of a layer of Llama-3.2-1B: qkv_proj, o_proj, gate_up_proj, down_proj [default: all].
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', value_parser = LLAMA_1B.map(|shape| shape.name))]
    only: Vec<String>,
    /// What both operands are.
    #[arg(long, value_name = "TYPE", default_value = "fp8", value_parser = ["fp8", "bf16"])]
    dtype: String,
    /// Measurements of each, of which the median counts.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeat: u16,
    /// Append the figures to a CSV file of `quaver bench`, and show them relative to the last ones there.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let history = args.csv.as_deref().map(History::open).transpose()?;
    let is_taken = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    let shapes: Vec<_> = LLAMA_1B.into_iter().filter(|shape| is_taken(shape.name)).collect();
    let rows: Vec<_> = args.rows.iter().map(|&rows| rows as usize).collect();
    let dtype = if args.dtype == "fp8" { DType::E4m3 } else { DType::Bf16 };
    let bar = progress();
    let told = |what: &str| bar.set_message(what.to_owned());
    let gemm = gemm::run(&args.device.spec(), &shapes, &rows, dtype, args.repeat.into(), told);
    bar.finish_and_clear();
    let gemm = gemm?;
    let mut out = io::stdout().lock();
    let device = &gemm.subject.device;
    writeln!(out, "{}: {} ({})\n", device.backend, device.name, device.driver)?;
    figures(&gemm.subject, &gemm.figures, history.as_ref()).write(&mut out)?;
    if let Some(history) = history {
        history.append(&gemm.subject, &gemm.figures)?;
    }
    Ok(())
}
