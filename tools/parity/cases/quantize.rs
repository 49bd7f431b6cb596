//! `Quantize`: byte-equal, on every number where rounding turns.

use quaver_core::e4m3;
use quaver_core::op::Op;

use super::List;
use crate::parity::build::{ActKind, Axis, Builder};
use crate::parity::{Problem, Rng};

pub fn add(list: &mut List) {
    list.add("quantize", "all_256_codes_round_trip", |_| {
        let values: Vec<f32> = (0..=255).map(e4m3::decode).collect();
        problem(ActKind::Static(1.0), Axis::Rows, 32, &values)
    });
    list.add("quantize", "every_tie_and_its_neighbours", |_| problem(ActKind::Static(1.0), Axis::Rows, 66, &ties()));
    list.add("quantize", "every_tie_per_token", |_| {
        // 448 in each row makes its scale 1.
        let rows = ties().chunks(65).flat_map(|row| [row, &[e4m3::MAX]].concat()).collect::<Vec<_>>();
        let whole = rows.len() / 66 * 66;
        problem(ActKind::PerToken, Axis::Rows, 66, &rows[..whole])
    });
    list.add("quantize", "saturation_infinity_nan", |_| {
        let large = [447.9, 448.0, 448.1, 463.9, 464.0, 464.1, 480.0, 512.0, 1e30, f32::MAX, f32::INFINITY, f32::NAN];
        let values: Vec<f32> = large.iter().flat_map(|&x| [x, -x]).collect();
        problem(ActKind::Static(1.0), Axis::Rows, values.len(), &values)
    });
    list.add("quantize", "zero_rows_per_token", |rng| {
        let mut values = rng.normals(5 * 64, 1.0);
        values[64..128].fill(0.0);
        values[256..].fill(-0.0);
        problem(ActKind::PerToken, Axis::Rows, 64, &values)
    });
    // Their scales would be subnormal, and the reciprocals infinite.
    list.add("quantize", "rows_of_tiny_numbers_per_token", |rng| {
        let mut values = [rng.normals(2 * 64, 1e-37), rng.normals(64, 1e-30)].concat();
        values.iter_mut().step_by(5).for_each(|x| *x = 0.0);
        values.iter_mut().filter(|x| !x.is_normal()).for_each(|x| *x = 0.0);
        problem(ActKind::PerToken, Axis::Rows, 64, &values)
    });
    list.add("quantize", "bf16_ties", |rng| {
        let tie = |rng: &mut Rng| (rng.bits() as u32 & 0xbfff_0000) | 0x8000;
        let near = |rng: &mut Rng| tie(rng).wrapping_add(rng.below(3) as u32).wrapping_sub(1);
        let values: Vec<f32> = (0..7 * 96).map(|_| f32::from_bits(near(rng))).collect();
        let is_normal = |x: f32| if x.is_normal() { x } else { 1.0 };
        let values: Vec<f32> = values.into_iter().map(is_normal).collect();
        problem(ActKind::Bf16, Axis::Rows, 96, &values)
    });
    for kind in [ActKind::F32, ActKind::Bf16, ActKind::Static(0.0371), ActKind::PerToken] {
        for (m, k) in [(0, 64), (1, 64), (3, 100), (17, 2048), (64, 37), (130, 256)] {
            list.add("quantize", format!("{}_m{m}_k{k}", kind.name()), move |rng| {
                problem(kind, Axis::Rows, k, &rng.normals(m * k, 3.0))
            });
        }
    }
    list.drawn("quantize", |rng| {
        let (kind, m, k) = (ActKind::draw(rng), 1 + rng.below(70), 2 + rng.below(700));
        (format!("{}_m{m}_k{k}", kind.name()), move |rng: &mut Rng| {
            problem(kind, Axis::Rows, k, &rng.normals(m * k, 3.0))
        })
    });
    list.add("quantize", "wanted_rows", |rng| problem(ActKind::PerToken, Axis::Wanted, 96, &rng.normals(5 * 96, 1.0)));
    // Rows between the smallest and the largest amax that a model can have.
    list.add("quantize", "rows_of_all_sizes_per_token", |rng| {
        let row = |exponent: i32, rng: &mut Rng| rng.normals(64, 2f32.powi(exponent));
        let values: Vec<f32> = (-60..60).flat_map(|exponent| row(exponent, rng)).collect();
        problem(ActKind::PerToken, Axis::Rows, 64, &values)
    });
}

/// The points halfway between codes, with the f32 numbers beside them, of both signs.
fn ties() -> Vec<f32> {
    let tie = |low: u8| (e4m3::decode(low) + e4m3::decode(low + 1)) / 2.0;
    let ties = (0..0x7e).map(tie).flat_map(|tie| [tie.next_down(), tie, tie.next_up()]);
    ties.flat_map(|x| [x, -x]).chain([0.0, -0.0, 1e-20, -1e-20, 448.0, -448.0]).chain([1.0; 24]).collect()
}

fn problem(kind: ActKind, axis: Axis, k: usize, values: &[f32]) -> Problem {
    let m = values.len() / k;
    let mut b = if axis == Axis::Rows { Builder::new(m, 0, 0) } else { Builder::new(2, m, 0) };
    let x = b.input_f32("x", axis, k, &values[..m * k]);
    let out = b.act_out(kind, axis, k);
    b.op(Op::Quantize { x, out });
    b.expect_act_bytes(out);
    b.finish()
}
