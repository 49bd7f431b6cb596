// sample: chooses or scores a token for each wanted row of logits[w, VOCAB] f32. Reference: core/sampler, whose steps
// and order of equal values these are. grid (w), a workgroup a row.
//
// A logit's word orders as an integer: the larger the logit, the smaller its word; ids break ties. Whatever a filter
// keeps is a prefix of that order, given by its last word and id.

override VOCAB: u32;
override STRIDE: u32;  // words a row of logits

@group(0) @binding(1) var<storage, read> live: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;  // [w, 44]: sampler::Sampled
@group(0) @binding(3) var<storage, read_write> history: array<u32>;  // [sequences, VOCAB]: sampler::Count
@group(0) @binding(4) var<storage, read> logits: array<u32>;  // [w, STRIDE], bits of f32
@group(0) @binding(5) var<storage, read> params: array<u32>;  // [w, 16]: sampler::RowParams
@group(0) @binding(6) var<storage, read> mask: array<u32>;  // [w, MASK]: sampler::Mask

// Ids are taken in blocks of four, as Philox gives words.
override BLOCKS: u32 = (VOCAB + 3u) / 4u;
override MASK: u32 = (VOCAB + 31u) / 32u;

const NO_TOKEN = 0xffffffffu;
const NO_WORD = 0xffffffffu;
const MINUS_INFINITY = 0xff800000u;
const GREEDY_BELOW = 1e-5;

// Fields of RowParams and of Sampled.
const SEQ = 0u;
const TARGET = 1u;
const TEMPERATURE = 2u;
const TOP_P = 3u;
const MIN_P = 4u;
const REPETITION = 5u;
const PRESENCE = 6u;
const FREQUENCY = 7u;
const TOP_K = 8u;
const TOP_N = 9u;
const SEED = 10u;
const POSITION = 12u;
const MASKED = 13u;
const TOP_IDS = 4u;
const TOP_LOGPROBS = 24u;

var<private> row: u32;
var<private> lane: u32;
var<private> penalizes: bool;
var<private> is_masked: bool;

fn word_param(field: u32) -> u32 {
  return params[row * 16u + field];
}

fn param(field: u32) -> f32 {
  return bitcast<f32>(word_param(field));
}

// The word of a finite number's bits; NO_WORD of any other.
fn word_of(bits: u32) -> u32 {
  let zero = select(bits, 0u, bits == 0x80000000u);
  let word = select(zero, ~zero & 0x7fffffffu, zero < 0x80000000u);
  return select(word, NO_WORD, (bits & 0x7f800000u) == 0x7f800000u);
}

fn value_of(word: u32) -> f32 {
  return bitcast<f32>(select(word, ~word & 0x7fffffffu, word < 0x80000000u));
}

// The word of a logit; NO_WORD beyond the vocabulary.
fn logit_word(id: u32) -> u32 {
  if (id >= VOCAB) {
    return NO_WORD;
  }
  return word_of(logits[row * STRIDE + id]);
}

// The word of a logit after mask and penalties.
fn changed_word(id: u32) -> u32 {
  let word = logit_word(id);
  if (word == NO_WORD || (is_masked && ((mask[row * MASK + id / 32u] >> (id % 32u)) & 1u) == 0u)) {
    return NO_WORD;
  }
  if (!penalizes) {
    return word;
  }
  let count = history[word_param(SEQ) * VOCAB + id];
  if (count == 0u) {
    return word;
  }
  let logit = value_of(word);
  var value = select(logit * param(REPETITION), logit / param(REPETITION), logit > 0.0);
  let generated = count & 0x7fffffffu;
  if (generated > 0u) {
    value -= param(FREQUENCY) * f32(generated);
    value -= param(PRESENCE);
  }
  return word_of(bitcast<u32>(clamp(value, -3.40282347e38, 3.40282347e38)));
}

// The first of the threads' (word, id) pairs.
fn first_pair(word: u32, id: u32) -> vec2<u32> {
  let least = workgroup_min(word, lane);
  return vec2<u32>(least, workgroup_min(select(NO_TOKEN, id, word == least), lane));
}

fn is_before(a: vec2<u32>, b: vec2<u32>) -> bool {
  return a.x < b.x || (a.x == b.x && a.y < b.y);
}

// The first logit behind a place in the order; where `is_first`, of all.
fn next_logit(place: vec2<u32>, is_first: bool) -> vec2<u32> {
  var best = vec2<u32>(NO_WORD, NO_TOKEN);
  for (var block = lane; block < BLOCKS; block += WG) {
    for (var i = 0u; i < 4u; i++) {
      let pair = vec2<u32>(logit_word(4u * block + i), 4u * block + i);
      if ((is_first || is_before(place, pair)) && is_before(pair, best)) {
        best = pair;
      }
    }
  }
  return first_pair(best.x, best.y);
}

// The first of the logits after mask and penalties.
fn first_changed() -> vec2<u32> {
  var best = vec2<u32>(NO_WORD, NO_TOKEN);
  for (var block = lane; block < BLOCKS; block += WG) {
    for (var i = 0u; i < 4u; i++) {
      let pair = vec2<u32>(changed_word(4u * block + i), 4u * block + i);
      if (is_before(pair, best)) {
        best = pair;
      }
    }
  }
  return first_pair(best.x, best.y);
}

// What a token weighs in a filter: 1, or its unscaled probability.
fn weight(word: u32, most: f32, by_probability: bool) -> f32 {
  if (by_probability) {
    return exp_f32((value_of(word) - most) / param(TEMPERATURE));
  }
  return 1.0;
}

// The weight of the tokens up to `end`, itself included.
fn mass(end: vec2<u32>, most: f32, by_probability: bool) -> f32 {
  var sum = 0.0;
  for (var block = lane; block < BLOCKS; block += WG) {
    for (var i = 0u; i < 4u; i++) {
      let pair = vec2<u32>(changed_word(4u * block + i), 4u * block + i);
      if (pair.x != NO_WORD && !is_before(end, pair)) {
        sum += weight(pair.x, most, by_probability);
      }
    }
  }
  return workgroup_sum(sum, lane);
}

// The end of the shortest prefix of those up to `end` that weighs `wanted`, by bisection over words, then over ids.
fn cut(end: vec2<u32>, most: f32, wanted: f32, by_probability: bool) -> vec2<u32> {
  var low = word_of(bitcast<u32>(most));
  var high = end.x;
  while (low < high) {
    let middle = low + (high - low) / 2u;
    if (mass(vec2<u32>(middle, NO_TOKEN), most, by_probability) >= wanted) {
      high = middle;
    } else {
      low = middle + 1u;
    }
  }
  var first = 0u;
  var last = select(VOCAB - 1u, min(end.y, VOCAB - 1u), low == end.x);
  while (first < last) {
    let middle = first + (last - first) / 2u;
    if (mass(vec2<u32>(low, middle), most, by_probability) >= wanted) {
      last = middle;
    } else {
      first = middle + 1u;
    }
  }
  return vec2<u32>(low, first);
}

// The token with the largest scaled logit plus Gumbel noise of those up to `end`.
fn race(end: vec2<u32>, most: f32) -> u32 {
  let seed = vec2<u32>(word_param(SEED), word_param(SEED + 1u));
  let position = word_param(POSITION);
  let min_p = param(MIN_P);
  var floor = -3.40282347e38;
  if (min_p > 0.0) {
    floor = ln_f32(min_p);
  }
  var best = vec2<u32>(NO_WORD, NO_TOKEN);
  for (var block = lane; block < BLOCKS; block += WG) {
    var noise = vec4<u32>(0u);
    var has_noise = false;
    for (var i = 0u; i < 4u; i++) {
      let id = 4u * block + i;
      let word = changed_word(id);
      if (word == NO_WORD || is_before(end, vec2<u32>(word, id))) {
        continue;
      }
      let scaled = (value_of(word) - most) / param(TEMPERATURE);
      if (scaled < floor) {
        continue;
      }
      if (!has_noise) {
        noise = philox(vec4<u32>(block, position, 0u, 0u), seed);
        has_noise = true;
      }
      let pair = vec2<u32>(word_of(bitcast<u32>(scaled + gumbel(noise[i]))), id);
      if (is_before(pair, best)) {
        best = pair;
      }
    }
  }
  return first_pair(best.x, best.y).y;
}

// At least one logit is finite.
fn choose() -> u32 {
  let first = first_changed();
  if (first.x == NO_WORD) {
    return NO_TOKEN;
  }
  let temperature = param(TEMPERATURE);
  if (temperature < GREEDY_BELOW) {
    return first.y;
  }
  let most = value_of(first.x);
  let top_k = word_param(TOP_K);
  let top_p = param(TOP_P);
  var end = vec2<u32>(NO_WORD - 1u, NO_TOKEN);
  if (top_k > 0u && top_k < VOCAB) {
    let finite = mass(end, most, false);
    if (f32(top_k) < finite) {
      end = cut(end, most, f32(top_k), false);
    }
  }
  if (top_p < 1.0) {
    end = cut(end, most, top_p * mass(end, most, true), true);
  }
  return race(end, most);
}

@compute @workgroup_size(WG)
fn sample(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  if (workgroup.x >= live[1]) {
    return;
  }
  row = workgroup.x;
  lane = lid;
  is_masked = word_param(MASKED) != 0u;
  penalizes = param(REPETITION) != 1.0 || param(PRESENCE) != 0.0 || param(FREQUENCY) != 0.0;
  let record = row * 44u;
  var faults = 0u;
  for (var block = lid; block < BLOCKS; block += WG) {
    for (var i = 0u; i < 4u; i++) {
      let id = min(4u * block + i, VOCAB - 1u);
      let bits = logits[row * STRIDE + id];
      faults += u32((bits & 0x7f800000u) == 0x7f800000u && bits != MINUS_INFINITY && id == 4u * block + i);
    }
  }
  let bad = u32(workgroup_sum(f32(faults), lid));
  let best = next_logit(vec2<u32>(0u), true);
  if (lid == 0u) {
    out[record] = NO_TOKEN;
    out[record + 1u] = MINUS_INFINITY;
    out[record + 2u] = 0u;
    out[record + 3u] = bad;
    for (var i = 0u; i < 20u; i++) {
      out[record + TOP_IDS + i] = NO_TOKEN;
      out[record + TOP_LOGPROBS + i] = MINUS_INFINITY;
    }
  }
  if (best.x == NO_WORD) {
    return;
  }
  let most = value_of(best.x);
  var sum = 0.0;
  for (var block = lid; block < BLOCKS; block += WG) {
    for (var i = 0u; i < 4u; i++) {
      let word = logit_word(4u * block + i);
      if (word != NO_WORD) {
        sum += exp_f32(value_of(word) - most);
      }
    }
  }
  let log_sum = ln_f32(workgroup_sum(sum, lid));

  var place = best;
  for (var i = 0u; i < min(word_param(TOP_N), 20u); i++) {
    if (i > 0u) {
      place = next_logit(place, false);
    }
    if (place.x == NO_WORD) {
      break;
    }
    if (lid == 0u) {
      out[record + TOP_IDS + i] = place.y;
      out[record + TOP_LOGPROBS + i] = bitcast<u32>(value_of(place.x) - most - log_sum);
    }
  }

  var token = word_param(TARGET);
  if (token == NO_TOKEN) {
    token = choose();
    if (lid == 0u && token != NO_TOKEN) {
      let at = word_param(SEQ) * VOCAB + token;
      let count = history[at];
      history[at] = count + u32((count & 0x7fffffffu) != 0x7fffffffu);
    }
  }
  if (lid == 0u) {
    out[record] = token;
  }
  if (token >= VOCAB) {
    return;
  }
  let own = vec2<u32>(logit_word(token), token);
  if (own.x == NO_WORD) {
    return;
  }
  var above = 0u;
  for (var block = lid; block < BLOCKS; block += WG) {
    for (var i = 0u; i < 4u; i++) {
      let id = 4u * block + i;
      above += u32(is_before(vec2<u32>(logit_word(id), id), own));
    }
  }
  let rank = 1u + u32(workgroup_sum(f32(above), lid));
  if (lid == 0u) {
    out[record + 1u] = bitcast<u32>(value_of(own.x) - most - log_sum);
    out[record + 2u] = rank;
  }
}
