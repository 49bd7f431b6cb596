//! A row's result depends neither on the rows beside it nor on the number of threads.

use half::bf16;
use quaver_core::e4m3;
use quaver_core::host::slices::{ActIn, ActOut, ColsOut, ScaleIn, ScaleOut, Slice, SliceMut, WeightIn};
use quaver_core::host::{Kernels, KvIn, RowsIn};
use quaver_core::op::Heads;
use quaver_core::philox::{philox, uniform};

use super::isa::Isa;
use super::{CpuKernels, kernels};

const ROWS: usize = 64;

/// Numbers between -2 and 2, the same on every run.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| uniform(philox([i, 0, 0, 0], [seed, 0])[0]) * 4.0 - 2.0).collect()
}

/// Runs `op(kernels, first row, rows)` on all rows and on some alone, on one thread, two and five, with every instruction
/// set of this machine: `width` results a row, whose bits must not differ.
fn assert_independent(width: usize, op: impl Fn(&mut CpuKernels, usize, usize) -> Vec<f32> + Sync) {
    let op = |kernels: &mut CpuKernels, first, rows| {
        let mut y = Vec::new();
        kernels.step(|kernels| y = op(kernels, first, rows));
        y
    };
    let bits = |list: Vec<f32>| list.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    for isa in Isa::all() {
        let open = |threads| kernels(Some(threads), isa).expect("threads start");
        let all = bits(op(&mut open(1), 0, ROWS));
        assert_eq!(all.len(), ROWS * width);
        for threads in [1, 2, 5] {
            let (mut kernels, isa) = (open(threads), isa.name());
            assert!(bits(op(&mut kernels, 0, ROWS)) == all, "{isa}, {threads} threads");
            for (first, rows) in [(0, 1), (17, 1), (63, 1), (30, 3), (1, 63)] {
                let alone = bits(op(&mut kernels, first, rows));
                let same = alone == all[first * width..][..rows * width];
                assert!(same, "{isa}, {rows} rows from {first}, {threads} threads");
            }
        }
    }
}

#[test]
fn a_row_of_linear_does_not_depend_on_its_neighbours_or_on_threads() {
    // Longer than the chunks that sums are taken in, and wider than a thread's blocks; no multiple of anything.
    for (n, k) in [(37, 2611), (301, 67)] {
        linear_is_independent(n, k);
    }
}

fn linear_is_independent(n: usize, k: usize) {
    let (x, w, scales) = (numbers(ROWS * k, 1), numbers(n * k, 2), numbers(n, 3));
    let codes = |x: &[f32]| x.iter().map(|&x| e4m3::encode(x * 200.0)).collect::<Vec<u8>>();
    let narrow = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<bf16>>();
    let (x_codes, w_codes, x_bf16, w_bf16) = (codes(&x), codes(&w), narrow(&x), narrow(&w));
    for w in [Slice::F32(&w), Slice::Bf16(&w_bf16), Slice::E4m3(&w_codes)] {
        let parts = [w.range(0, 5 * k), w.range(5 * k, (n - 5) * k)];
        for x in [Slice::F32(&x), Slice::Bf16(&x_bf16), Slice::E4m3(&x_codes)] {
            assert_independent(2 * n, |kernels, first, rows| {
                let x = ActIn { data: x.range(first * k, rows * k), scale: ScaleIn::Static(0.3) };
                let w = WeightIn { parts: &parts, scale: Some(&scales) };
                let (mut stored, mut sum) = (vec![bf16::ZERO; rows * n], vec![0.7; rows * n]);
                let out = |data| ColsOut { data, stride: n, first: 0, n };
                kernels.linear(x, w, k, out(SliceMut::Bf16(&mut stored)), false);
                kernels.linear(x, w, k, out(SliceMut::F32(&mut sum)), true);
                let both = stored.chunks(n).zip(sum.chunks(n));
                both.flat_map(|(stored, sum)| stored.iter().map(|x| x.to_f32()).chain(sum.iter().copied())).collect()
            });
        }
    }
}

#[test]
fn a_row_of_rms_norm_does_not_depend_on_its_neighbours_or_on_threads() {
    let d = 523;
    let (x, gamma) = (numbers(ROWS * d, 1), numbers(d, 2));
    assert_independent(d, |kernels, first, rows| {
        let mut y = vec![0.0; rows * d];
        let out = ActOut { data: SliceMut::F32(&mut y), scale: ScaleOut::None };
        kernels.rms_norm(&x[first * d..][..rows * d], &gamma, 1e-5, out);
        y
    });
}

/// Rows of two sequences, so that alone they are decode rows, and together two prefills.
#[test]
fn a_row_of_attend_does_not_depend_on_its_neighbours_or_on_threads() {
    let heads = Heads { q: 8, kv: 2, dim: 40 };
    let (width, page_tokens, pages, prefix) = (heads.q * heads.dim, 16, 8, 70);
    let q = numbers(ROWS * width, 1);
    let cache = |seed| numbers(2 * pages * heads.kv * page_tokens * heads.dim, seed);
    let (k, v) = (cache(2), cache(3));
    let page_table: Vec<u32> = (0..2 * pages as u32).map(|page| page * 5 % 16).collect();
    let row = |i: usize| (i as u32 / 40, prefix + i as u32 % 40);
    let (seq, position): (Vec<u32>, Vec<u32>) = (0..ROWS).map(row).unzip();
    assert_independent(width, |kernels, first, rows| {
        let range = first..first + rows;
        let mut spans: Vec<[u32; 4]> = Vec::new();
        for i in range.clone() {
            match spans.last_mut().filter(|span| span[2] == seq[i]) {
                Some(span) => span[1] += 1,
                None => spans.push([(i - first) as u32, 1, seq[i], position[i]]),
            }
        }
        let who = RowsIn {
            seq: &seq[range.clone()],
            position: &position[range],
            page_table: &page_table,
            pages,
            spans: &spans,
        };
        let kv = KvIn { k: Slice::F32(&k), v: Slice::F32(&v), page_tokens, scales: (1.0, 1.0) };
        let mut y = vec![0.0; rows * width];
        let out = ActOut { data: SliceMut::F32(&mut y), scale: ScaleOut::None };
        kernels.attend(Slice::F32(&q[first * width..][..rows * width]), who, heads, kv, out);
        y
    });
}
