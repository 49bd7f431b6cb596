// sample: chooses or scores a token for each wanted row of logits[w, vocab] f32, `stride` apart. Reference: core/sampler, whose steps
// and order of equal values these are. grid (w), a block a row.
//
// A logit's key orders as an integer: the larger the logit, the smaller its upper word; the lower word, its id, breaks
// ties. Whatever a filter keeps is a prefix of that order, given by its last key, which a radix search finds: each pass over
// the vocabulary weighs the keys by their next eleven bits, and goes on in the bin where the weight that is wanted is
// reached. Weights are whole numbers, so that their sums do not depend on an order.

#define NO_TOKEN 0xffffffffu
#define NO_WORD 0xffffffffu
#define NO_KEY 0xffffffffffffffffull
#define MINUS_INFINITY 0xff800000u
#define GREEDY_BELOW 1e-5f
#define LARGEST 3.40282347e38f
#define MOST_TOP 20
#define DIGIT 11
#define BINS (1 << DIGIT)
// What a probability of 1 weighs: sums over 2^23 tokens fit 64 bits.
#define ONE 1099511627776.0f

struct RowParams {  // sampler::RowParams
  u32 seq, target;
  float temperature, top_p, min_p, repetition, presence, frequency;
  u32 top_k, top_n, seed_lo, seed_hi, position, masked, reserved[2];
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

// The sum over the threads up to this one; `all` gets that over all. `scratch` has 32 elements of shared memory.
DEVICE u64 block_prefix(u64 x, u64* scratch, u64& all) {
  u32 lane = threadIdx.x % 32;
#pragma unroll
  for (u32 by = 1; by < 32; by *= 2) {
    u64 before = __shfl_sync(0xffffffffu, x, lane - by);
    if (lane >= by) x += before;
  }
  __syncthreads();
  if (lane == 31) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  all = 0;
  u64 before = 0;
  for (u32 i = 0; i < blockDim.x / 32; i++) {
    if (i == threadIdx.x / 32) before = all;
    all += scratch[i];
  }
  return before + x;
}

// What all threads of a block share.
struct Shared {
  u64 keys[32];
  float sums[32];
  // Of each bin: its weight in two halves, which 32-bit atomics add to, and its keys.
  u32 low[BINS], high[BINS], counts[BINS];
  // Where the weight that is wanted is reached: the bin, the weight before it, and the keys in it.
  u64 before;
  u32 bin, count;
  u64 top[MOST_TOP];
  u32 top_count;
};

struct Row {
  const float* logits;
  const u32* history;
  const u32* mask;  // where p.masked
  RowParams p;
  u32 vocab;
  bool penalizes;
  Shared* shared;

  DEVICE_FUNCTION u64 key(u32 id) const { return key_of(word_of(__float_as_uint(logits[id])), id); }

  // Of a logit after mask and penalties; a finite one that is allowed stays finite.
  DEVICE_FUNCTION u64 changed(u32 id) const {
    if (p.masked && !(mask[id / 32] >> id % 32 & 1)) return NO_KEY;
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
    return block_reduce<Min>(best, shared->keys);
  }

  // Adds to a bin; 32 bits at a time, as shared memory has no atomic sum of 64.
  DEVICE_FUNCTION void weigh(u32 bin, u64 weight) const {
    u32 low = (u32)weight, old = atomicAdd(&shared->low[bin], low);
    u32 high = (u32)(weight >> 32) + (old + low < old ? 1 : 0);
    if (high > 0) atomicAdd(&shared->high[bin], high);
    atomicAdd(&shared->counts[bin], 1u);
  }

  // The end of the shortest prefix of the keys up to `end` whose weight reaches wanted(weight of them all), which is
  // above 0; `end` where they do not.
  template <class Key, class Weight, class Wanted>
  DEVICE_FUNCTION u64 cut(u64 end, Key key, Weight weight, Wanted wanted) const {
    // Of the last key all bits from `known` on are; `need` is what keys that share them have still to weigh.
    u64 prefix = 0, need = 0;
    u32 known = 64;
    while (known > 0) {
      u32 shift = known > DIGIT ? known - DIGIT : 0;
      __syncthreads();
      for (u32 i = threadIdx.x; i < BINS; i += blockDim.x) shared->low[i] = shared->high[i] = shared->counts[i] = 0;
      __syncthreads();
      for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) {
        u64 own = key(id);
        if (own <= end && (known == 64 || own >> known == prefix)) weigh((u32)(own >> shift) % BINS, weight(own));
      }
      __syncthreads();
      const u32 OWN = BINS / 1024;
      u64 weights[OWN], sum = 0, all;
#pragma unroll
      for (u32 i = 0; i < OWN; i++) {
        u32 bin = threadIdx.x * OWN + i;
        weights[i] = (u64)shared->high[bin] << 32 | shared->low[bin];
        sum += weights[i];
      }
      u64 before = block_prefix(sum, shared->keys, all) - sum;
      if (known == 64) need = wanted(all);
      if (need > all) return end;
#pragma unroll
      for (u32 i = 0; i < OWN; i++) {
        if (before < need && before + weights[i] >= need) {
          shared->bin = threadIdx.x * OWN + i, shared->before = before;
          shared->count = shared->counts[threadIdx.x * OWN + i];
        }
        before += weights[i];
      }
      __syncthreads();
      // The last digit may begin with bits that are known.
      u64 fresh = shared->bin & ((1u << (known - shift)) - 1);
      prefix = (known == 64 ? 0 : prefix << (known - shift)) | fresh;
      need -= shared->before;
      known = shift;
      if (shared->count == 1) break;
    }
    return prefix << known | (((u64)1 << known) - 1);
  }

  // The token with the largest scaled logit plus Gumbel noise of those up to `end`; four tokens share a draw.
  DEVICE_FUNCTION u32 race(u64 end, float most) const {
    float floor = p.min_p > 0.0f ? ln_f32(p.min_p) : -LARGEST;
    u64 best = NO_KEY;
    for (u32 block = threadIdx.x; block < (vocab + 3) / 4; block += blockDim.x) {
      bool runs[4], any = false;
      float scaled[4];
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        u64 own = 4 * block + i < vocab ? changed(4 * block + i) : NO_KEY;
        scaled[i] = (value_of((u32)(own >> 32)) - most) / p.temperature;
        runs[i] = own <= end && scaled[i] >= floor;
        any |= runs[i];
      }
      if (!any) continue;
      Words noise = philox(block, p.position, p.seed_lo, p.seed_hi);
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        u32 word = word_of(__float_as_uint(scaled[i] + gumbel(noise.w[i])));
        if (runs[i]) best = Min::of(best, key_of(word, 4 * block + i));
      }
    }
    return (u32)block_reduce<Min>(best, shared->keys);
  }

  // `best` is the first key before mask and penalties.
  DEVICE_FUNCTION u32 choose(u64 best) const {
    auto own = [&](u32 id) { return changed(id); };
    u64 first = penalizes || p.masked ? least(own) : best;
    if (first == NO_KEY) return NO_TOKEN;
    if (p.temperature < GREEDY_BELOW) return (u32)first;
    float most = value_of((u32)(first >> 32));
    u64 end = NO_KEY - 1;
    if (p.top_k > 0 && p.top_k < vocab) {
      end = cut(end, own, [](u64) { return (u64)1; }, [&](u64) { return (u64)p.top_k; });
    }
    if (p.top_p < 1.0f) {
      auto probability = [&](u64 key) {
        return (u64)(exp_f32((value_of((u32)(key >> 32)) - most) / p.temperature) * ONE);
      };
      end = cut(end, own, probability, [&](u64 all) { return max((u64)ceil((double)p.top_p * (double)all), (u64)1); });
    }
    return race(end, most);
  }

  // The first `count` keys before penalties, in any order, in shared->top; how many there are.
  DEVICE_FUNCTION u32 take_top(u32 count) const {
    auto own = [&](u32 id) { return key(id); };
    u64 end = cut(NO_KEY - 1, own, [](u64) { return (u64)1; }, [&](u64) { return (u64)count; });
    if (threadIdx.x == 0) shared->top_count = 0;
    __syncthreads();
    for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) {
      u64 own = key(id);
      if (own <= end) shared->top[atomicAdd(&shared->top_count, 1u)] = own;
    }
    __syncthreads();
    return shared->top_count;
  }
};

KERNEL(1024, 1) sample(const u32* live, const float* logits, const RowParams* params, const u32* mask, u32* history,
                       Sampled* sampled, u32 vocab, u32 stride) {
  SHARED(Shared, shared, 1);
  dependency_wait();
  if (blockIdx.x >= live[1]) return;
  RowParams p = params[blockIdx.x];
  bool penalizes = p.repetition != 1.0f || p.presence != 0.0f || p.frequency != 0.0f;
  u32* counts = history + (size_t)p.seq * vocab;
  const u32* allowed = mask + (size_t)blockIdx.x * ((vocab + 31) / 32);
  Row row = {logits + (size_t)blockIdx.x * stride, counts, allowed, p, vocab, penalizes, shared};
  Sampled* out = sampled + blockIdx.x;
  bool is_first = threadIdx.x == 0;

  // In one pass faults, the first key, and the sum of exponentials relative to the largest logit so far.
  u32 bad = 0;
  u64 best = NO_KEY;
  float sum = 0.0f, largest = -LARGEST;
  for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) {
    u64 own = row.key(id);
    if (own == NO_KEY) {
      bad += __float_as_uint(row.logits[id]) != MINUS_INFINITY ? 1 : 0;
      continue;
    }
    float value = value_of((u32)(own >> 32)), weight = exp_f32(-fabsf(value - largest));
    sum = value > largest ? fmaf(sum, weight, 1.0f) : sum + weight;
    largest = fmaxf(largest, value);
    best = Min::of(best, own);
  }
  bad = block_reduce<Add>(bad, shared->counts);
  best = block_reduce<Min>(best, shared->keys);
  if (is_first) {
    out->token = NO_TOKEN, out->logprob = MINUS_INFINITY, out->rank = 0, out->bad_logits = bad;
    for (int i = 0; i < MOST_TOP; i++) out->top_ids[i] = NO_TOKEN, out->top_logprobs[i] = MINUS_INFINITY;
  }
  if (best == NO_KEY) return;
  float most = value_of((u32)(best >> 32));
  float log_sum = ln_f32(block_reduce<Add>(sum * exp_f32(largest - most), shared->sums));

  if (p.top_n > 0) {
    u32 count = row.take_top(min(p.top_n, (u32)MOST_TOP));
    if (threadIdx.x < count) {
      u64 own = shared->top[threadIdx.x];
      u32 place = 0;
      for (u32 i = 0; i < count; i++) place += shared->top[i] < own ? 1 : 0;
      out->top_ids[place] = (u32)own;
      out->top_logprobs[place] = __float_as_uint(value_of((u32)(own >> 32)) - most - log_sum);
    }
  }

  u32 token = p.target;
  if (token == NO_TOKEN) {
    token = row.choose(best);
    // Nobody reads the count any more when it changes.
    __syncthreads();
    if (is_first && token != NO_TOKEN && (counts[token] & 0x7fffffffu) != 0x7fffffffu) counts[token]++;
  }
  if (is_first) out->token = token;
  if (token >= vocab) return;
  u64 own = row.key(token);
  if (own == NO_KEY) return;
  u32 before = 0;
  if (own != best) {
    for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) before += row.key(id) < own ? 1 : 0;
    before = block_reduce<Add>(before, shared->counts);
  }
  if (is_first) {
    out->logprob = __float_as_uint(value_of((u32)(own >> 32)) - most - log_sum);
    out->rank = before + 1;
  }
}
ENTRY(sample)
