//! Claims about the host sampler, held against an oracle that sorts in f64 and draws without shortcuts.

use super::*;
use crate::philox::{gumbel, philox, uniform};
use proptest::prelude::*;

fn sample(logits: &[f32], params: &RowParams) -> Sampled {
    Sampler::new().sample(logits, params, &[], &mut vec![0; logits.len()])
}

fn params(change: impl FnOnce(&mut SamplingParams)) -> RowParams {
    let mut params = SamplingParams::default();
    change(&mut params);
    params.validate().expect("the test's parameters");
    params.row(0, 0, 0x5eed_0000_1234)
}

/// Logits of some variety, about -4 to 4, the same on every run.
fn some_logits(vocab: u32, seed: u32) -> Vec<f32> {
    (0..vocab).map(|id| uniform(philox([id, 0, 0, 0], [seed, 0])[0]) * 8.0 - 4.0).collect()
}

/// Tokens in descending order with their f64 probabilities at the row's temperature.
fn sorted(logits: &[f32], temperature: f32) -> Vec<(u32, f64)> {
    let scaled: Vec<f64> = logits.iter().map(|&l| f64::from(l) / f64::from(temperature)).collect();
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scaled.iter().map(|l| (l - max).exp()).sum();
    let mut tokens: Vec<_> = (0..).zip(scaled.iter().map(|l| (l - max).exp() / sum)).collect();
    tokens.sort_by(|a: &(u32, f64), b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    tokens
}

/// What the filters leave, with renormalized probabilities, by the book: top-k, top-p of the rest, min-p of the rest.
/// `slack` moves the boundaries of top-p and min-p, where f32 and f64 may disagree.
fn filtered(logits: &[f32], params: &RowParams, slack: f64) -> Vec<(u32, f64)> {
    let renormalized = |tokens: &[(u32, f64)]| -> Vec<(u32, f64)> {
        let sum: f64 = tokens.iter().map(|t| t.1).sum();
        tokens.iter().map(|&(id, p)| (id, p / sum)).collect()
    };
    let mut tokens = sorted(logits, params.temperature);
    if params.top_k > 0 {
        tokens.truncate(params.top_k as usize);
    }
    tokens = renormalized(&tokens);
    if params.top_p < 1.0 {
        let mut before = 0.0;
        let keep = tokens.iter().take_while(|t| {
            let is_kept = before < f64::from(params.top_p) + slack;
            before += t.1;
            is_kept
        });
        tokens = tokens[..keep.count().max(1)].to_vec();
    }
    tokens = renormalized(&tokens);
    let floor = tokens[0].1 * f64::from(params.min_p) * (1.0 - slack);
    tokens.retain(|t| t.1 >= floor);
    renormalized(&tokens)
}

/// Every token that `draws` positions choose.
fn drawn(logits: &[f32], params: &RowParams, draws: u32) -> Vec<u32> {
    let mut sampler = Sampler::new();
    let mut history = vec![0; logits.len()];
    for position in 0..draws {
        sampler.sample(logits, &RowParams { position, ..*params }, &[], &mut history);
    }
    history
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_id_on_ties() {
    let greedy = params(|p| p.temperature = 0.0);
    assert_eq!(sample(&[1.0, 3.0, 2.0, 3.0], &greedy).token, 1);
    assert_eq!(sample(&[-0.0, 0.0], &greedy).token, 0);
    assert_eq!(sample(&[0.0, -0.0], &greedy).token, 0);
    assert_eq!(sample(&[f32::NEG_INFINITY, -1e38], &greedy).token, 1);
    assert_eq!(sample(&[1.0, 1.0 + f32::EPSILON], &RowParams { temperature: 9e-6, ..greedy }).token, 1);
}

#[test]
fn top_k_keeps_exactly_k_and_the_lower_ids_of_a_tie() {
    let logits = [1.0, 2.0, 1.0, 1.0, 2.0, 1.0];
    let counts = drawn(&logits, &params(|p| p.top_k = 3), 2000);
    assert_eq!(counts.iter().map(|&c| c > 0).collect::<Vec<_>>(), [true, true, false, false, true, false]);
}

#[test]
fn top_p_keeps_the_smallest_prefix_that_reaches_it_after_top_k() {
    // Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625; of the first three 4/7, 2/7, 1/7.
    let logits = [0.5f32, 0.25, 0.125, 0.0625, 0.0625].map(f32::ln);
    let kept = |top_k, top_p| {
        let row = params(|p| (p.top_k, p.top_p) = (top_k, top_p));
        drawn(&logits, &row, 2000).iter().filter(|&&count| count > 0).count()
    };
    assert_eq!([0.4, 0.6, 0.8, 0.9, 0.95, 1.0].map(|top_p| kept(0, top_p)), [1, 2, 3, 4, 5, 5]);
    assert_eq!([0.55, 0.8, 0.9].map(|top_p| kept(3, top_p)), [1, 2, 3]);
    assert_eq!(kept(0, 1e-30), 1, "the likeliest always stays");
}

#[test]
fn min_p_is_relative_to_the_likeliest() {
    let logits = [0.0, 0.5f32.ln(), 0.1f32.ln(), 0.01f32.ln()];
    let kept = |min_p| drawn(&logits, &params(|p| p.min_p = min_p), 3000).iter().filter(|&&count| count > 0).count();
    assert_eq!([0.0, 0.05, 0.2, 0.6, 1.0].map(kept), [4, 3, 2, 1, 1]);
    assert_eq!([0.5, 0.5f32.next_up()].map(kept), [2, 1], "a token on the boundary stays");
}

#[test]
fn draws_have_the_filtered_distribution() {
    let logits = some_logits(48, 1);
    let cases: [fn(&mut SamplingParams); 7] = [
        |_| {},
        |p| p.temperature = 0.5,
        |p| p.temperature = 3.0,
        |p| p.top_k = 9,
        |p| p.top_p = 0.8,
        |p| p.min_p = 0.05,
        |p| (p.temperature, p.top_k, p.top_p, p.min_p) = (1.7, 30, 0.95, 0.1),
    ];
    for (case, change) in cases.into_iter().enumerate() {
        let row = params(change);
        let expected = filtered(&logits, &row, 0.0);
        let counts = drawn(&logits, &row, 100_000);
        let total: u32 = expected.iter().map(|&(id, _)| counts[id as usize]).sum();
        assert_eq!(total, 100_000, "case {case}: tokens appear that the filters remove");
        // Tokens that are expected fewer than ten times stand in one cell, the last.
        let (common, rare): (Vec<_>, Vec<_>) = expected.into_iter().partition(|&(_, p)| p >= 1e-4);
        let mut cells: Vec<_> = common.iter().map(|&(id, p)| (f64::from(counts[id as usize]), 1e5 * p)).collect();
        if !rare.is_empty() {
            cells.push(
                rare.iter().fold((0.0, 0.0), |(n, e), &(id, p)| (n + f64::from(counts[id as usize]), e + 1e5 * p)),
            );
        }
        let chi_square: f64 = cells.iter().map(|(n, expected)| (n - expected).powi(2) / expected).sum();
        // The 99.9 % quantile by Wilson and Hilferty.
        let freedom = (cells.len() - 1) as f64;
        let spread = 2.0 / (9.0 * freedom);
        let limit = freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3);
        assert!(chi_square < limit, "case {case}: chi-square {chi_square:.1}, limit {limit:.1}, {freedom} degrees");
    }
}

/// A draw depends on nothing but seed, position and logits; these tokens may change only with this definition.
#[test]
fn a_seed_gives_the_same_text_forever() {
    let logits = some_logits(1000, 2);
    let row = params(|p| p.top_p = 0.9);
    let text = |row: &RowParams| -> Vec<u32> {
        (0..8).map(|position| sample(&logits, &RowParams { position, ..*row }).token).collect()
    };
    assert_eq!(text(&row), GOLDEN);
    assert_ne!(text(&RowParams { seed_lo: row.seed_lo + 1, ..row }), GOLDEN);
    assert_ne!(text(&RowParams { seed_hi: row.seed_hi + 1, ..row }), GOLDEN);
    assert!(GOLDEN.iter().any(|&token| token != GOLDEN[0]), "positions differ");
}
const GOLDEN: [u32; 8] = [787, 269, 552, 164, 192, 488, 547, 458];

#[test]
fn positions_draw_independently() {
    let row = params(|_| {});
    let mut pairs = [0u32; 4];
    for position in 0..40_000 {
        let coin = |position| sample(&[0.0, 0.0], &RowParams { position, ..row }).token;
        pairs[(coin(2 * position) * 2 + coin(2 * position + 1)) as usize] += 1;
    }
    let chi_square: f64 = pairs.iter().map(|&n| (f64::from(n) - 1e4).powi(2) / 1e4).sum();
    assert!(chi_square < 16.3, "3 degrees of freedom, 99.9 %: {chi_square:.1} of {pairs:?}");
}

#[test]
fn a_choice_does_not_depend_on_tokens_that_lose() {
    let row = params(|p| p.temperature = 0.8);
    for position in 0..200 {
        let row = RowParams { position, ..row };
        let mut logits = some_logits(300, 3);
        let token = sample(&logits, &row).token;
        // Losers trade places with losers, at lower odds, or leave.
        let losers: Vec<usize> = (0..300).filter(|&id| id != token as usize).collect();
        for (&id, &other) in losers.iter().zip(losers.iter().rev()) {
            logits[id] = if id % 3 == 0 { f32::NEG_INFINITY } else { logits[id].min(logits[other]) - 1.0 };
        }
        assert_eq!(sample(&logits, &row).token, token, "position {position}");
    }
}

#[test]
fn filters_only_remove_a_winner_that_they_exclude() {
    let logits = some_logits(300, 4);
    for position in 0..200 {
        let open = RowParams { position, ..params(|_| {}) };
        let closed = RowParams { top_k: 100, top_p: 0.9, ..open };
        let winner = sample(&logits, &open).token;
        let is_kept = filtered(&logits, &closed, 0.0).iter().any(|&(id, _)| id == winner);
        assert_eq!(sample(&logits, &closed).token == winner, is_kept, "position {position}");
    }
}

#[test]
fn penalties_are_those_of_vllm_in_their_order() {
    // Prompt: 0, 1. Output: 1 once, 2 three times. Token 3: neither.
    let mut history = [0; 4];
    Count::fill(&mut history, &[0, 1], &[1, 2, 2, 2]);
    let row = params(|p| (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) = (2.0, 0.25, 0.5));
    let penalized = |logits: [f32; 4]| [0, 1, 2, 3].map(|i| penalize(logits[i], Count(history[i]), &row));
    assert_eq!(penalized([4.0, 4.0, 4.0, 4.0]), [2.0, 2.0 - 0.25 - 0.5, 2.0 - 0.75 - 0.5, 4.0]);
    assert_eq!(penalized([-4.0, -4.0, -4.0, -4.0]), [-8.0, -8.0 - 0.25 - 0.5, -8.0 - 0.75 - 0.5, -4.0]);
    assert_eq!(penalized([0.0, 0.0, 0.0, 0.0]), [0.0, -0.75, -1.25, 0.0]);
}

#[test]
fn penalties_move_the_choice_but_not_the_logprobs() {
    let greedy = params(|p| (p.temperature, p.frequency_penalty) = (0.0, 1.0));
    let (mut history, mut sampler, logits) = ([0; 3], Sampler::new(), [3.0, 2.5, 0.0]);
    let run: Vec<Sampled> = (0..4).map(|_| sampler.sample(&logits, &greedy, &[], &mut history)).collect();
    assert_eq!(run.iter().map(|s| s.token).collect::<Vec<_>>(), [0, 1, 0, 1]);
    assert_eq!(run.iter().map(|s| s.rank).collect::<Vec<_>>(), [1, 2, 1, 2]);
    assert_eq!(history, [2, 2, 0]);
    assert_eq!(run[0].logprob, run[2].logprob);
    assert!((run[0].logprob - run[1].logprob - 0.5).abs() < 1e-6);
}

#[test]
fn extreme_penalties_stay_finite() {
    let mut history = [u32::MAX; 2];
    let row = RowParams { repetition: f32::MIN_POSITIVE, frequency: -2.0, ..params(|_| {}) };
    let sampled = Sampler::new().sample(&[3e38, -3e38], &row, &[], &mut history);
    assert_eq!((sampled.token, history), (0, [u32::MAX; 2]));
}

#[test]
fn logprobs_sum_to_one_over_the_vocabulary() {
    let logits = some_logits(5000, 5);
    let mut history = vec![0; 5000];
    let mut sampler = Sampler::new();
    let mut sum = 0.0;
    for (token, exact) in sorted(&logits, 1.0) {
        let scored = sampler.sample(&logits, &RowParams::score(0, token, 0), &[], &mut history);
        assert_eq!(scored.token, token);
        assert!((f64::from(scored.logprob) - exact.ln()).abs() < 2e-6, "token {token}");
        sum += f64::from(scored.logprob).exp();
    }
    assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    assert!(history.iter().all(|&word| word == 0), "scoring leaves the history alone");
}

#[test]
fn top_logprobs_are_the_likeliest_in_order() {
    let logits = [1.0, 3.0, 1.0, f32::NEG_INFINITY, 2.0, f32::NAN];
    let sampled = sample(&logits, &RowParams::score(0, 2, 20));
    assert_eq!(sampled.top().map(|(id, _)| id).collect::<Vec<_>>(), [1, 4, 0, 2]);
    assert_eq!((sampled.rank, sampled.logprob), (4, sampled.top_logprobs[3]));
    assert_eq!(sampled.top_logprobs[4..], [f32::NEG_INFINITY; 16]);
    assert_eq!(sample(&logits, &RowParams::score(0, 2, 2)).top().count(), 2);
    assert_eq!(sample(&logits, &RowParams::score(0, 2, 0)).top().count(), 0);
}

#[test]
fn faulty_logits_are_counted_and_never_chosen() {
    let row = params(|p| p.temperature = 100.0);
    let mut history = [0; 5];
    for position in 0..500 {
        let logits = [f32::NAN, 1.0, f32::INFINITY, f32::NEG_INFINITY, 2.0];
        let sampled = Sampler::new().sample(&logits, &RowParams { position, ..row }, &[], &mut history);
        assert_eq!(sampled.bad_logits, 2);
    }
    assert!(history[1] > 0 && history[4] > 0 && history[1] + history[4] == 500);
}

#[test]
fn a_row_without_a_finite_logit_gives_no_token() {
    for (logits, bad_logits) in
        [(&[f32::NEG_INFINITY; 3][..], 0), (&[f32::NAN; 3], 3), (&[f32::INFINITY; 3], 3), (&[], 0)]
    {
        for row in [params(|_| {}), params(|p| p.temperature = 0.0), params(|p| p.top_k = 1), RowParams::score(0, 1, 5)]
        {
            assert_eq!(sample(logits, &row), Sampled { bad_logits, ..Sampled::NONE });
        }
    }
}

#[test]
fn a_target_outside_the_vocabulary_has_no_logprob() {
    let sampled = sample(&[1.0, 2.0], &RowParams::score(0, 7, 1));
    assert_eq!((sampled.token, sampled.logprob, sampled.rank, sampled.top_ids[0]), (7, f32::NEG_INFINITY, 0, 1));
}

fn any_params() -> impl Strategy<Value = RowParams> {
    let penalties = (prop_oneof![Just(1.0f32), 1e-6f32..=100.0], -2.0f32..=2.0, -2.0f32..=2.0);
    let filters =
        (prop_oneof![Just(1.0f32), 1e-6f32..=1.0], 0.0f32..=1.0, prop_oneof![Just(0), 0u32..64, any::<u32>()]);
    let temperature = prop_oneof![Just(0.0f32), 0.0f32..=1e-4, 0.05f32..=2.0, 0.0f32..=100.0];
    (temperature, filters, penalties, any::<(u64, u32)>(), 0usize..=20).prop_map(
        |(t, f, p, (seed, position), top_n)| {
            let params = SamplingParams {
                temperature: t,
                top_p: f.0,
                min_p: f.1,
                top_k: f.2,
                repetition_penalty: p.0,
                presence_penalty: p.1,
                frequency_penalty: p.2,
                logprobs: Some(top_n),
                ..Default::default()
            };
            params.validate().expect("every one of these is allowed");
            params.row(0, position, seed)
        },
    )
}

proptest! {
    #[test]
    fn any_bits_and_any_allowed_params_give_a_finite_token_or_none(
        words in prop::collection::vec((any::<u32>(), any::<u32>()), 0..100),
        row in any_params(),
        target in prop_oneof![3 => Just(NO_TOKEN), 1 => 0u32..120],
    ) {
        let logits: Vec<f32> = words.iter().map(|w| f32::from_bits(w.0)).collect();
        let before: Vec<u32> = words.iter().map(|w| w.1).collect();
        let mut history = before.clone();
        let row = RowParams { target, ..row };
        let sampled = Sampler::new().sample(&logits, &row, &[], &mut history);
        let finite = logits.iter().filter(|l| l.is_finite()).count();
        let changed = before.iter().zip(&history).filter(|(a, b)| a != b).count();
        prop_assert_eq!(sampled.top().count(), finite.min(row.top_n as usize));
        prop_assert!(!sampled.logprob.is_nan() && sampled.top().all(|(_, p)| p <= 0.0));
        if finite == 0 {
            prop_assert_eq!(sampled.token, NO_TOKEN);
            prop_assert_eq!(changed, 0);
        } else if target == NO_TOKEN {
            prop_assert!(logits[sampled.token as usize].is_finite());
            prop_assert!((1..=finite as u32).contains(&sampled.rank));
            let word = Count(before[sampled.token as usize]);
            prop_assert_eq!(history[sampled.token as usize], word.with_generated().0);
            prop_assert!(changed <= 1);
        } else {
            prop_assert_eq!((sampled.token, changed), (target, 0));
        }
    }

    /// The token is the winner of the full race among what the oracle's filters leave, wherever they are placed within
    /// the rounding of f32.
    #[test]
    fn selection_and_shortcuts_equal_the_sorted_oracle(seed: u32, vocab in 1u32..400, coarse: bool, row in any_params()) {
        let mut logits = some_logits(vocab, seed);
        if coarse {
            logits.iter_mut().for_each(|l| *l = l.round());
        }
        let temperature = row.temperature.max(0.05);
        let row = RowParams { temperature, repetition: 1.0, presence: 0.0, frequency: 0.0, ..row };
        let max = largest(&logits);
        let score = |id: u32| {
            let words = philox([id / 4, row.position, 0, 0], [row.seed_lo, row.seed_hi]);
            (logits[id as usize] - max) / row.temperature + gumbel(uniform(words[id as usize % 4]))
        };
        let winner = |slack| {
            let mut ids: Vec<u32> = filtered(&logits, &row, slack).into_iter().map(|t| t.0).collect();
            ids.sort();
            ids.into_iter().rev().max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap()
        };
        let token = sample(&logits, &row).token;
        prop_assert!([-1e-5, 0.0, 1e-5].iter().any(|&slack| winner(slack) == token), "token {token}, oracle {}", winner(0.0));
    }

    #[test]
    fn rank_is_the_place_in_the_order(seed: u32, vocab in 1u32..60, coarse: bool) {
        let mut logits = some_logits(vocab, seed);
        if coarse {
            logits.iter_mut().for_each(|l| *l = l.round());
        }
        for (i, (id, _)) in sorted(&logits, 1.0).into_iter().enumerate() {
            let scored = sample(&logits, &RowParams::score(0, id, 20));
            prop_assert_eq!(scored.rank as usize, i + 1);
            if i < 20 {
                prop_assert_eq!((scored.top_ids[i], scored.top_logprobs[i]), (id, scored.logprob));
            }
        }
    }
}

#[test]
fn a_mask_is_applied_before_everything_but_the_scores() {
    let logits = some_logits(200, 11);
    for change in [
        (|p| p.temperature = 0.0) as fn(&mut SamplingParams),
        |_| (),
        |p| (p.top_k, p.top_p, p.min_p, p.repetition_penalty) = (5, 0.9, 0.1, 1.5),
    ] {
        let row = RowParams { top_n: 3, ..params(change) };
        let mut mask = Mask::all(200);
        (0..200).filter(|id| id % 7 != 3).for_each(|id| mask.forbid(id));
        let masked: Vec<f32> = (0..200).map(|id| if id % 7 == 3 { logits[id] } else { f32::NEG_INFINITY }).collect();
        for position in 0..50 {
            let row = RowParams { position, ..row };
            let (mut history, mut same) = (vec![Count(0).with_prompt().0; 200], vec![Count(0).with_prompt().0; 200]);
            let with = RowParams { masked: 1, ..row };
            let got = Sampler::new().sample(&logits, &with, mask.words(), &mut history);
            let want = Sampler::new().sample(&masked, &row, &[], &mut same);
            assert_eq!((got.token, &history), (want.token, &same), "as if other logits were -inf");
            let scored = Sampler::new().sample(&logits, &RowParams::score(0, got.token, 3), &[], &mut []);
            assert_eq!(got, scored, "log-probabilities are those of all tokens");
        }
    }
}

#[test]
fn a_mask_that_leaves_nothing_gives_no_token_and_keeps_the_alternatives() {
    let logits = [1.0, f32::NEG_INFINITY, 3.0];
    let mut mask = Mask::all(3);
    (0..3).filter(|id| *id != 1).for_each(|id| mask.forbid(id));
    for temperature in [0.0, 1.0] {
        let row = RowParams { masked: 1, top_n: 2, ..params(|p| p.temperature = temperature) };
        let mut history = [0; 3];
        let sampled = Sampler::new().sample(&logits, &row, mask.words(), &mut history);
        assert_eq!((sampled.token, sampled.rank, sampled.bad_logits, history), (NO_TOKEN, 0, 0, [0; 3]));
        assert_eq!(sampled.top().map(|(id, _)| id).collect::<Vec<_>>(), [2, 0]);
    }
}
