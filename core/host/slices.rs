//! Views of buffers in host memory: what the kernels of `reference` and `cpu` read and write.

use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;

use crate::e4m3;
use crate::op::DType;

/// Elements to read.
#[derive(Clone, Copy)]
pub enum Slice<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16.
    Bf16(&'a [bf16]),
    /// E4M3 codes, without their scale.
    E4m3(&'a [u8]),
}

impl<'a> Slice<'a> {
    /// The elements of a buffer.
    ///
    /// # Panics
    /// Where `bytes` are not aligned for `dtype`, or `dtype` is no number that kernels compute with.
    pub fn new(dtype: DType, bytes: &'a [u8]) -> Self {
        match dtype {
            DType::F32 => Slice::F32(cast_slice(bytes)),
            DType::Bf16 => Slice::Bf16(cast_slice(bytes)),
            DType::E4m3 => Slice::E4m3(bytes),
            DType::U32 => panic!("u32 words are not read as numbers"),
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Slice::F32(x) => x.len(),
            Slice::Bf16(x) => x.len(),
            Slice::E4m3(x) => x.len(),
        }
    }

    /// True where there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as they lie in memory.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Slice::F32(x) => cast_slice(x),
            Slice::Bf16(x) => cast_slice(x),
            Slice::E4m3(x) => x,
        }
    }

    /// `len` elements from `first` on.
    pub fn range(self, first: usize, len: usize) -> Self {
        match self {
            Slice::F32(x) => Slice::F32(&x[first..first + len]),
            Slice::Bf16(x) => Slice::Bf16(&x[first..first + len]),
            Slice::E4m3(x) => Slice::E4m3(&x[first..first + len]),
        }
    }

    /// Row `i` of a row-major matrix.
    pub fn row(self, i: usize, cols: usize) -> Self {
        self.range(i * cols, cols)
    }

    /// The rows of a row-major matrix.
    pub fn rows(self, cols: usize) -> impl Iterator<Item = Slice<'a>> {
        (0..self.len() / cols).map(move |i| self.row(i, cols))
    }

    /// The values in f32: exact for each of the types; codes are decoded, but not scaled.
    #[inline(always)]
    pub fn load(self, into: &mut [f32]) {
        match self {
            Slice::F32(x) => into.copy_from_slice(x),
            Slice::Bf16(x) => {
                for (y, x) in into.iter_mut().zip(x) {
                    *y = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }
            Slice::E4m3(x) => {
                for (y, &code) in into.iter_mut().zip(x) {
                    *y = e4m3::decode(code);
                }
            }
        }
    }

    /// `load` into a new vector.
    pub fn to_vec(self) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        self.load(&mut values);
        values
    }
}

/// Elements to write.
pub enum SliceMut<'a> {
    /// f32.
    F32(&'a mut [f32]),
    /// bf16.
    Bf16(&'a mut [bf16]),
    /// E4M3 codes.
    E4m3(&'a mut [u8]),
}

impl<'a> SliceMut<'a> {
    /// The elements of a buffer.
    ///
    /// # Panics
    /// As [`Slice::new`].
    pub fn new(dtype: DType, bytes: &'a mut [u8]) -> Self {
        match dtype {
            DType::F32 => SliceMut::F32(cast_slice_mut(bytes)),
            DType::Bf16 => SliceMut::Bf16(cast_slice_mut(bytes)),
            DType::E4m3 => SliceMut::E4m3(bytes),
            DType::U32 => panic!("u32 words are not written as numbers"),
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            SliceMut::F32(x) => x.len(),
            SliceMut::Bf16(x) => x.len(),
            SliceMut::E4m3(x) => x.len(),
        }
    }

    /// True where there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The f32 elements.
    ///
    /// # Panics
    /// Where the elements are of another type, which `Program::check` has excluded.
    pub fn into_f32(self) -> &'a mut [f32] {
        match self {
            SliceMut::F32(x) => x,
            _ => panic!("elements are not f32"),
        }
    }

    /// The first `n` elements, for the length of the view itself.
    pub fn first(self, n: usize) -> Self {
        match self {
            SliceMut::F32(x) => SliceMut::F32(&mut x[..n]),
            SliceMut::Bf16(x) => SliceMut::Bf16(&mut x[..n]),
            SliceMut::E4m3(x) => SliceMut::E4m3(&mut x[..n]),
        }
    }

    /// The first `n` elements, and the others.
    pub fn split(self, n: usize) -> (Self, Self) {
        match self {
            SliceMut::F32(x) => {
                let (first, rest) = x.split_at_mut(n);
                (SliceMut::F32(first), SliceMut::F32(rest))
            }
            SliceMut::Bf16(x) => {
                let (first, rest) = x.split_at_mut(n);
                (SliceMut::Bf16(first), SliceMut::Bf16(rest))
            }
            SliceMut::E4m3(x) => {
                let (first, rest) = x.split_at_mut(n);
                (SliceMut::E4m3(first), SliceMut::E4m3(rest))
            }
        }
    }

    /// `len` elements from `first` on.
    pub fn range(&mut self, first: usize, len: usize) -> SliceMut<'_> {
        match self {
            SliceMut::F32(x) => SliceMut::F32(&mut x[first..first + len]),
            SliceMut::Bf16(x) => SliceMut::Bf16(&mut x[first..first + len]),
            SliceMut::E4m3(x) => SliceMut::E4m3(&mut x[first..first + len]),
        }
    }

    /// The value of element `i`, not scaled.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            SliceMut::F32(x) => x[i],
            SliceMut::Bf16(x) => x[i].to_f32(),
            SliceMut::E4m3(x) => e4m3::decode(x[i]),
        }
    }

    /// Stores values, rounded to nearest even; for codes they are multiplied by `inv` first.
    #[inline(always)]
    pub fn store(&mut self, values: &[f32], inv: f32) {
        match self {
            SliceMut::F32(y) => y.copy_from_slice(values),
            SliceMut::Bf16(y) => {
                for (y, &x) in y.iter_mut().zip(values) {
                    *y = round_to_bf16(x);
                }
            }
            SliceMut::E4m3(y) => {
                for (code, &x) in y.iter_mut().zip(values) {
                    *code = e4m3::encode(x * inv);
                }
            }
        }
    }

    /// The rows of a row-major matrix, apart; the last one may be shorter.
    pub fn rows(self, cols: usize) -> Vec<SliceMut<'a>> {
        match self {
            SliceMut::F32(x) => x.chunks_mut(cols).map(SliceMut::F32).collect(),
            SliceMut::Bf16(x) => x.chunks_mut(cols).map(SliceMut::Bf16).collect(),
            SliceMut::E4m3(x) => x.chunks_mut(cols).map(SliceMut::E4m3).collect(),
        }
    }
}

/// Activations `[m, k]` to read.
#[derive(Clone, Copy)]
pub struct ActIn<'a> {
    /// `[m, k]`.
    pub data: Slice<'a>,
    /// What a code is multiplied by.
    pub scale: ScaleIn<'a>,
}

/// The scale of [`ActIn`].
#[derive(Clone, Copy)]
pub enum ScaleIn<'a> {
    /// f32 or bf16: none.
    None,
    /// One for all.
    Static(f32),
    /// `[m]`.
    PerToken(&'a [f32]),
}

impl ScaleIn<'_> {
    /// The scale of a row; 1 where there is none.
    pub fn row(self, i: usize) -> f32 {
        match self {
            ScaleIn::None => 1.0,
            ScaleIn::Static(scale) => scale,
            ScaleIn::PerToken(scales) => scales[i],
        }
    }
}

/// A weight `[n, k]` to read.
#[derive(Clone, Copy)]
pub struct WeightIn<'a> {
    /// `[n, k]`, some rows a part and all of one dtype: tensors that the checkpoint keeps apart.
    pub parts: &'a [Slice<'a>],
    /// `[n]` for codes.
    pub scale: Option<&'a [f32]>,
}

impl<'a> WeightIn<'a> {
    /// The rows of all parts.
    pub fn rows(self, k: usize) -> impl Iterator<Item = Slice<'a>> {
        self.parts.iter().flat_map(move |part| part.rows(k))
    }
}

/// Activations `[m, k]` to write: rounded, or quantized with a static or a per-token scale.
pub struct ActOut<'a> {
    /// `[m, k]`.
    pub data: SliceMut<'a>,
    /// How codes are scaled.
    pub scale: ScaleOut<'a>,
}

/// The scale of [`ActOut`].
pub enum ScaleOut<'a> {
    /// f32 or bf16: none.
    None,
    /// The reciprocal of a static scale.
    Static(f32),
    /// `[m]`: the scales, to be written.
    PerToken(&'a mut [f32]),
}

impl<'a> ActOut<'a> {
    /// The rows, apart.
    pub fn rows(self, cols: usize) -> Vec<RowOut<'a>> {
        let rows = self.data.rows(cols).into_iter();
        match self.scale {
            ScaleOut::None => rows.map(|data| RowOut { data, scale: RowScale::Static(1.0) }).collect(),
            ScaleOut::Static(inv) => rows.map(|data| RowOut { data, scale: RowScale::Static(inv) }).collect(),
            ScaleOut::PerToken(scales) => {
                rows.zip(scales).map(|(data, scale)| RowOut { data, scale: RowScale::PerToken(scale) }).collect()
            }
        }
    }
}

/// One row of [`ActOut`].
pub struct RowOut<'a> {
    data: SliceMut<'a>,
    scale: RowScale<'a>,
}

enum RowScale<'a> {
    Static(f32),
    PerToken(&'a mut f32),
}

impl RowOut<'_> {
    /// Rounds or quantizes a whole row: the one rounding point of every op that writes activations.
    #[inline(always)]
    pub fn store(&mut self, values: &[f32]) {
        let inv = match &mut self.scale {
            RowScale::Static(inv) => *inv,
            RowScale::PerToken(scale) => {
                **scale = dynamic_scale(values);
                1.0 / **scale
            }
        };
        self.data.store(values, inv);
    }
}

/// The bf16 nearest to `x`, ties to even; NaN stays NaN. As `bf16::from_f32`, without a branch.
#[inline(always)]
fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    bf16::from_bits(if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { (rounded >> 16) as u16 })
}

/// The per-token scale of a row: amax / 448, the f32 epsilon where that is 0 (compressed-tensors, `calculate_qparams`)
/// or subnormal: its reciprocal might be infinite, which makes NaN of the zeros of the row, and devices may flush it.
#[inline(always)]
pub fn dynamic_scale(values: &[f32]) -> f32 {
    let amax = values.iter().fold(0f32, |amax, x| amax.max(x.abs()));
    let scale = amax / e4m3::MAX;
    if scale < f32::MIN_POSITIVE { f32::EPSILON } else { scale }
}

/// `n` columns of a row-major f32 or bf16 buffer, to write.
pub struct ColsOut<'a> {
    /// `[m, stride]`.
    pub data: SliceMut<'a>,
    /// Columns of the whole buffer.
    pub stride: usize,
    /// The first of the columns to write.
    pub first: usize,
    /// How many.
    pub n: usize,
}

impl<'a> ColsOut<'a> {
    /// The rows of these columns, apart.
    pub fn rows(self) -> Vec<SliceMut<'a>> {
        let columns = self.first..self.first + self.n;
        match self.data {
            SliceMut::F32(x) => {
                x.chunks_exact_mut(self.stride).map(|row| SliceMut::F32(&mut row[columns.clone()])).collect()
            }
            SliceMut::Bf16(x) => {
                x.chunks_exact_mut(self.stride).map(|row| SliceMut::Bf16(&mut row[columns.clone()])).collect()
            }
            SliceMut::E4m3(_) => unreachable!("Linear writes f32 or bf16"),
        }
    }

    /// Blocks of so many columns, each with its part of every row: for as many tasks.
    pub fn blocks(self, widths: &[usize]) -> Vec<Vec<SliceMut<'a>>> {
        let mut blocks: Vec<Vec<_>> = widths.iter().map(|_| Vec::new()).collect();
        for mut row in self.rows() {
            for (block, &width) in blocks.iter_mut().zip(widths) {
                let (part, rest) = row.split(width);
                block.push(part);
                row = rest;
            }
        }
        blocks
    }
}
