//! The buffers of a device: where they are, and the host's bytes in and out of the device's layout.

use std::collections::HashMap;
use std::ops::Range;

use bytemuck::cast_slice_mut;
use quaver_core::bytes::Bytes;
use quaver_core::op::{Buf, BufDesc, Fetch};
use quaver_core::{Error, Result};

use super::device::Device;
use crate::layout::{Layout, Layouts};

/// Bytes that an upload pads at a time.
const STAGE: usize = 8 << 20;

/// See the module.
#[derive(Default)]
pub struct Memory {
    pub layouts: Layouts,
    buffers: Vec<Resident>,
    /// What was last written to buffers of three words: a program's `live` is one of them.
    threes: HashMap<Buf, [u32; 3]>,
}

struct Resident {
    address: u64,
    is_constant: bool,
}

/// The runs of bytes that a range of a buffer is on the device: their offsets there, and their places in the range.
fn runs(layout: &Layout, range: Range<usize>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let (row, stride, is_plain) = (layout.row, layout.stride, layout.is_plain());
    let step = if is_plain { range.end.max(1) } else { row };
    let first = if is_plain { 0 } else { range.start / row * row };
    (first..range.end).step_by(step).map(move |start| {
        let own = start.max(range.start)..(start + step).min(range.end);
        let at = if is_plain { own.start } else { own.start / row * stride + own.start % row };
        (at as u64, own.start - range.start..own.end - range.start)
    })
}

impl Memory {
    /// Where a buffer is.
    pub fn address(&self, buf: Buf) -> u64 {
        self.buffers[buf.0 as usize].address
    }

    /// True where the buffer was loaded and must not be written.
    pub fn is_constant(&self, buf: Buf) -> bool {
        self.buffers[buf.0 as usize].is_constant
    }

    /// The three words of a program's `live` buffer.
    pub fn live(&self, buf: Buf) -> [u32; 3] {
        self.threes.get(&buf).copied().unwrap_or_default()
    }

    /// A zeroed buffer.
    pub fn alloc(&mut self, device: &mut dyn Device, desc: &BufDesc, is_constant: bool) -> Result<Buf> {
        let layout = Layout::new(desc, u64::MAX >> 1);
        let address = device.alloc(&desc.name, layout.part_bytes(0).max(16))?;
        self.buffers.push(Resident { address, is_constant });
        Ok(self.layouts.push(layout))
    }

    /// A constant from parts of consecutive rows.
    pub fn load(&mut self, device: &mut dyn Device, desc: &BufDesc, parts: &[Bytes]) -> Result<Buf> {
        let (got, row) = (parts.iter().map(|part| part.len()).sum::<usize>(), desc.cols * desc.dtype.size());
        if got != desc.bytes() || parts.is_empty() || parts.iter().any(|part| part.len() % row != 0) {
            let (name, need) = (&desc.name, desc.bytes());
            return Err(error(device, format!("{name} takes {need} bytes in whole rows, {got} were given")));
        }
        let buf = self.alloc(device, desc, true)?;
        let (layout, mut address) = (self.layouts.get(buf), self.address(buf));
        for part in parts {
            for rows in part.chunks((STAGE / row).max(1) * row) {
                match layout.is_plain() {
                    true => device.write(address, rows)?,
                    false => device.write(address, &layout.pad(rows))?,
                }
                address += (rows.len() / row * layout.stride) as u64;
            }
        }
        Ok(buf)
    }

    /// Overwrites bytes of a buffer.
    pub fn write(&mut self, device: &mut dyn Device, dst: Buf, offset: usize, bytes: &[u8]) -> Result<()> {
        let range = offset..offset + bytes.len();
        let layout = self.layouts.find(dst).filter(|layout| range.end <= layout.desc.bytes());
        let Some(layout) = layout.filter(|_| !self.is_constant(dst)) else {
            return Err(error(device, format!("bytes {range:?} of buffer {} cannot be written", dst.0)));
        };
        if layout.desc.bytes() == 12 {
            let words = self.threes.entry(dst).or_default();
            cast_slice_mut(words)[range.clone()].copy_from_slice(bytes);
        }
        for (at, part) in runs(layout, range) {
            device.write(self.address(dst) + at, &bytes[part])?;
        }
        Ok(())
    }

    /// Queues a copy of bytes of a buffer.
    pub fn fetch(&self, device: &mut dyn Device, src: Buf, range: Range<usize>) -> Result<Fetch> {
        let Some(layout) = self.layouts.find(src).filter(|layout| range.end <= layout.desc.bytes()) else {
            return Err(error(device, format!("bytes {range:?} of buffer {} cannot be read", src.0)));
        };
        let address = self.address(src);
        device.fetch(&runs(layout, range).map(|(at, part)| (address + at, part.len())).collect::<Vec<_>>())
    }
}

/// An error that names the device.
pub fn error(device: &dyn Device, why: impl Into<String>) -> Error {
    let info = device.info();
    Error::device(format!("{} ({})", info.backend, info.name), why)
}
