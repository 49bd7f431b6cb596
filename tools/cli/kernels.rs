//! `quaver kernels`: the CUDA kernels, compiled ahead of time.

use std::io::{self, Write};

use anyhow::Result;
use quaver_backends::cuda::compiler::Compiler;
use quaver_backends::cuda::kernels_for;

use super::table::{Align, Table, human_bytes};

#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Compile the kernels into the cache folder (QUAVER_CACHE), which machines without NVRTC can run from.
    Build {
        /// What to compile for, several with commas: sm_80, sm_89, sm_90a, or compute_89 for PTX.
        #[arg(long, value_name = "NAME", required = true, value_delimiter = ',')]
        arch: Vec<String>,
    },
}

pub fn run(args: Args) -> Result<()> {
    let Command::Build { arch } = args.command;
    build(&arch)
}

fn build(architectures: &[String]) -> Result<()> {
    let mut table = Table::new(&[Align::Left, Align::Left, Align::Right, Align::Left]);
    table.row(["architecture", "kernel", "size", ""].map(str::to_owned));
    let named = architectures.iter().map(|architecture| Ok((architecture, kernels_for(architecture)?)));
    for (architecture, kernels) in named.collect::<quaver::Result<Vec<_>>>()? {
        let compiler = Compiler::new(architecture);
        for kernel in kernels {
            let built = compiler.build(kernel)?;
            let state = if built.is_new { "compiled" } else { "in the cache" };
            let size = human_bytes(built.image.len() as u64);
            table.row([architecture.clone(), kernel.name.to_owned(), size, state.to_owned()]);
        }
    }
    Ok(table.write(&mut io::stdout().lock()).and_then(|()| io::stdout().flush())?)
}
