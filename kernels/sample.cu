// sample: chooses or scores a token for each wanted row of logits[w, vocab] f32, `stride` apart. Reference: core/sampler, whose steps
// and order of equal values these are. grid (w), a block a row.
//
// A logit's key orders as an integer: the larger the logit, the smaller its upper word; the lower word, its id, breaks
// ties. Whatever a filter keeps is a prefix of that order, given by its last key.

#define NO_TOKEN 0xffffffffu
#define NO_WORD 0xffffffffu
#define NO_KEY 0xffffffffffffffffull
#define MINUS_INFINITY 0xff800000u
#define GREEDY_BELOW 1e-5f
#define LARGEST 3.40282347e38f
#define MOST_TOP 20

struct RowParams {  // sampler::RowParams
  u32 seq, target;
  float temperature, top_p, min_p, repetition, presence, frequency;
  u32 top_k, top_n, seed_lo, seed_hi, position, reserved[3];
};

struct Sampled {  // sampler::Sampled
  u32 token, logprob, rank, bad_logits;
  u32 top_ids[MOST_TOP];
  u32 top_logprobs[MOST_TOP];
};

// The word of a finite number's bits; NO_WORD of any other.
DEVICE u32 word_of(u32 bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return NO_WORD;
  u32 zero = bits == 0x80000000u ? 0 : bits;
  return zero >> 31 ? zero : ~zero & 0x7fffffffu;
}

DEVICE float value_of(u32 word) { return __uint_as_float(word >> 31 ? word : ~word & 0x7fffffffu); }
DEVICE u64 key_of(u32 word, u32 id) { return word == NO_WORD ? NO_KEY : (u64)word << 32 | id; }

struct Row {
  const float* logits;
  const u32* history;
  RowParams p;
  u32 vocab;
  bool penalizes;
  u64* keys;    // 32 of shared memory, for reductions
  float* sums;  // the same

  DEVICE_FUNCTION u64 key(u32 id) const { return key_of(word_of(__float_as_uint(logits[id])), id); }

  // Of a logit after its penalties; a finite one stays finite.
  DEVICE_FUNCTION u64 penalized(u32 id) const {
    u32 count = penalizes ? history[id] : 0, bits = __float_as_uint(logits[id]);
    if (count == 0 || word_of(bits) == NO_WORD) return key(id);
    float value = logits[id] > 0.0f ? logits[id] / p.repetition : logits[id] * p.repetition;
    u32 generated = count & 0x7fffffffu;
    if (generated > 0) {
      value -= p.frequency * (float)generated;
      value -= p.presence;
    }
    return key_of(word_of(__float_as_uint(fminf(fmaxf(value, -LARGEST), LARGEST))), id);
  }

  template <class F> DEVICE_FUNCTION u64 least(F of) const {
    u64 best = NO_KEY;
    for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) best = Min::of(best, of(id));
    return block_reduce<Min>(best, keys);
  }

  template <class F> DEVICE_FUNCTION float total(F of) const {
    float sum = 0.0f;
    for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) sum += of(id);
    return block_reduce<Add>(sum, sums);
  }

  // The weight of the tokens up to `end`, itself included: 1 each, or unscaled probabilities.
  DEVICE_FUNCTION float mass(u64 end, float most, bool by_probability) const {
    return total([&](u32 id) {
      u64 own = penalized(id);
      if (own == NO_KEY || own > end) return 0.0f;
      return by_probability ? exp_f32((value_of((u32)(own >> 32)) - most) / p.temperature) : 1.0f;
    });
  }

  // The end of the shortest prefix of those up to `end` that weighs `wanted`, by bisection.
  DEVICE_FUNCTION u64 cut(u64 end, float most, float wanted, bool by_probability) const {
    u64 low = (u64)word_of(__float_as_uint(most)) << 32, high = end;
    while (low < high) {
      u64 middle = low + (high - low) / 2;
      if (mass(middle, most, by_probability) >= wanted) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // The token with the largest scaled logit plus Gumbel noise of those up to `end`.
  DEVICE_FUNCTION u32 race(u64 end, float most) const {
    float floor = p.min_p > 0.0f ? ln_f32(p.min_p) : -LARGEST;
    return (u32)least([&](u32 id) {
      u64 own = penalized(id);
      if (own == NO_KEY || own > end) return NO_KEY;
      float scaled = (value_of((u32)(own >> 32)) - most) / p.temperature;
      if (scaled < floor) return NO_KEY;
      Words noise = philox(id / 4, p.position, p.seed_lo, p.seed_hi);
      u32 word = id % 4 == 0 ? noise.w[0] : id % 4 == 1 ? noise.w[1] : id % 4 == 2 ? noise.w[2] : noise.w[3];
      return key_of(word_of(__float_as_uint(scaled + gumbel(word))), id);
    });
  }

  // At least one logit is finite.
  DEVICE_FUNCTION u32 choose() const {
    u64 first = least([&](u32 id) { return penalized(id); });
    if (p.temperature < GREEDY_BELOW) return (u32)first;
    float most = value_of((u32)(first >> 32));
    u64 end = NO_KEY - 1;
    if (p.top_k > 0 && p.top_k < vocab && (float)p.top_k < mass(end, most, false)) {
      end = cut(end, most, (float)p.top_k, false);
    }
    if (p.top_p < 1.0f) end = cut(end, most, p.top_p * mass(end, most, true), true);
    return race(end, most);
  }
};

KERNEL(1024, 1) sample(const u32* live, const float* logits, const RowParams* params, u32* history, Sampled* sampled,
                       u32 vocab, u32 stride) {
  SHARED(u64, keys, 32);
  SHARED(float, sums, 32);
  if (blockIdx.x >= live[1]) return;
  RowParams p = params[blockIdx.x];
  bool penalizes = p.repetition != 1.0f || p.presence != 0.0f || p.frequency != 0.0f;
  u32* counts = history + (size_t)p.seq * vocab;
  Row row = {logits + (size_t)blockIdx.x * stride, counts, p, vocab, penalizes, keys, sums};
  Sampled* out = sampled + blockIdx.x;
  bool is_first = threadIdx.x == 0;

  u32 bad = (u32)row.total([&](u32 id) {
    u32 bits = __float_as_uint(row.logits[id]);
    return (bits & 0x7f800000u) == 0x7f800000u && bits != MINUS_INFINITY ? 1.0f : 0.0f;
  });
  u64 best = row.least([&](u32 id) { return row.key(id); });
  if (is_first) {
    out->token = NO_TOKEN, out->logprob = MINUS_INFINITY, out->rank = 0, out->bad_logits = bad;
    for (int i = 0; i < MOST_TOP; i++) out->top_ids[i] = NO_TOKEN, out->top_logprobs[i] = MINUS_INFINITY;
  }
  if (best == NO_KEY) return;
  float most = value_of((u32)(best >> 32));
  float log_sum = ln_f32(row.total([&](u32 id) {
    u64 own = row.key(id);
    return own == NO_KEY ? 0.0f : exp_f32(value_of((u32)(own >> 32)) - most);
  }));

  u64 place = best;
  for (u32 i = 0; i < min(p.top_n, (u32)MOST_TOP) && place != NO_KEY; i++) {
    if (is_first) {
      out->top_ids[i] = (u32)place;
      out->top_logprobs[i] = __float_as_uint(value_of((u32)(place >> 32)) - most - log_sum);
    }
    place = row.least([&](u32 id) {
      u64 own = row.key(id);
      return own > place ? own : NO_KEY;
    });
  }

  u32 token = p.target;
  if (token == NO_TOKEN) {
    token = row.choose();
    // Nobody reads the count any more when it changes.
    __syncthreads();
    if (is_first && token != NO_TOKEN && (counts[token] & 0x7fffffffu) != 0x7fffffffu) counts[token]++;
  }
  if (is_first) out->token = token;
  if (token >= vocab) return;
  u64 own = row.key(token);
  if (own == NO_KEY) return;
  float rank = 1.0f + row.total([&](u32 id) { return row.key(id) < own ? 1.0f : 0.0f; });
  if (is_first) {
    out->logprob = __float_as_uint(value_of((u32)(own >> 32)) - most - log_sum);
    out->rank = (u32)rank;
  }
}
ENTRY(sample)
