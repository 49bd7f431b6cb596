//! `quaver devices`: what this machine offers, and what `auto` takes of it.

use std::io::{self, Write};

use anyhow::Result;
use quaver_backends::{Device, Unavailable};
use serde_json::{Value, json};

use super::table::{Align, Table, human_bytes};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let (devices, unavailable) = (quaver_backends::devices(), quaver_backends::unavailable());
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{:#}", to_json(&devices, &unavailable))?;
        return Ok(());
    }
    let head = ["backend", "device", "name", "driver", "memory", "fp8", ""];
    let mut table = Table::new(&[Align::Left; 7]);
    table.row(head.map(str::to_owned));
    for (i, Device { index, info, .. }) in devices.iter().enumerate() {
        let memory = info.memory.map_or("-".to_owned(), human_bytes);
        let auto = if i == 0 { "auto takes this one" } else { "" };
        let backend = info.backend.to_owned();
        let (name, driver, fp8) = (info.name.clone(), info.driver.clone(), fp8(info.native_fp8));
        table.row([backend, index.to_string(), name, driver, memory, fp8.to_owned(), auto.to_owned()]);
    }
    table.write(&mut out)?;
    for Unavailable { backend, why } in unavailable {
        writeln!(out, "{backend}: {why}")?;
    }
    Ok(())
}

const fn fp8(native: bool) -> &'static str {
    if native { "native" } else { "emulated" }
}

fn to_json(devices: &[Device], unavailable: &[Unavailable]) -> Value {
    let device = |(i, Device { index, info, .. }): (usize, &Device)| {
        json!({
            "backend": info.backend, "device": index, "name": info.name, "driver": info.driver,
            "memory_bytes": info.memory, "fp8": fp8(info.native_fp8), "auto": i == 0,
        })
    };
    let missing = |Unavailable { backend, why }: &Unavailable| json!({"backend": backend, "why": why});
    json!({
        "devices": devices.iter().enumerate().map(device).collect::<Value>(),
        "unavailable": unavailable.iter().map(missing).collect::<Value>(),
    })
}
