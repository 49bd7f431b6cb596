// sample: chooses or scores a token for each wanted row of logits[w, vocab] f32, `stride` apart. Reference: core/sampler, whose steps
// and order of equal values these are. Three kernels, one behind the other, that leave each other a Draft a row: whole numbers, for
// which no order matters, and the sums of GROUPS warps, however many rows there are.
//   sample_parts  grid (PARTS, w): what every row needs to know of its logits.
//   sample_draft  grid (any, w): their sum; the race of a row that filters nothing; the few keys where its filters may end.
//   sample        grid (any, w): the results. The first block of a row chooses and writes, all count the token's rank.
//
// A logit's key orders as an integer: the larger the logit, the smaller its upper word; the lower word, its id, breaks
// ties. Whatever a filter keeps is a prefix of that order, given by its last key, which a radix search finds: each pass over
// the keys weighs them by their next eleven bits, and goes on in the bin where the weight that is wanted is
// reached. Weights are whole numbers, so that their sums do not depend on an order. The keys are those of a list, where it
// holds enough of them, or the vocabulary's.

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
// Blocks that a row's logits are dealt to, and the warps that they are.
#define PARTS 64
#define GROUPS (PARTS * 4)
// Keys of a list: two for each thread that reads it.
#define LIST 2048
// A list for top-p goes to the best logit of the group that comes at this place.
#define LIKELY (GROUPS / 4 * 3)

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

// What a warp of sample_parts finds: its first keys before and after mask and penalties, the sum of exponentials relative to the
// largest logit, and faults.
struct Group { u64 best, first; float sum; u32 bad; };

// Keys in any order; more than LIST where it does not hold them all.
struct List { u32 count, reserved; u64 keys[LIST]; };

// What the kernels leave each other of a row.
struct Draft {
  Group groups[GROUPS];
  // Those of all groups; the ln of the sum.
  u64 best, first;
  float log_sum;
  u32 reserved;
  // Who wins the race of all tokens, and what the probabilities of all weigh.
  u64 winner, weight;
  // The first keys before mask and penalties, and after them.
  List top, runners;
};
static_assert(sizeof(Draft) == 38968, "as lower.rs has it");

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

  DEVICE_FUNCTION bool chooses() const { return p.target == NO_TOKEN; }
  DEVICE_FUNCTION bool changes() const { return penalizes || p.masked; }
  DEVICE_FUNCTION bool is_greedy() const { return p.temperature < GREEDY_BELOW; }
  DEVICE_FUNCTION bool cuts_count() const { return p.top_k > 0 && p.top_k < vocab; }
  DEVICE_FUNCTION bool cuts_weight() const { return p.top_p < 1.0f; }
  // Does a filter keep a prefix? Else all tokens race.
  DEVICE_FUNCTION bool cuts() const { return chooses() && !is_greedy() && (cuts_count() || cuts_weight()); }
  DEVICE_FUNCTION bool races() const { return chooses() && !is_greedy() && !cuts(); }

  DEVICE_FUNCTION u64 key(u32 id, float logit) const { return key_of(word_of(__float_as_uint(logit)), id); }

  // Of a logit after mask and penalties; a finite one that is allowed stays finite.
  DEVICE_FUNCTION u64 changed(u32 id, float logit) const {
    u64 own = key(id, logit);
    if (own == NO_KEY || (p.masked && !(mask[id / 32] >> id % 32 & 1))) return NO_KEY;
    u32 count = penalizes ? history[id] : 0;
    if (count == 0) return own;
    float value = logit > 0.0f ? logit / p.repetition : logit * p.repetition;
    u32 generated = count & 0x7fffffffu;
    if (generated > 0) {
      value -= p.frequency * (float)generated;
      value -= p.presence;
    }
    return key(id, fminf(fmaxf(value, -LARGEST), LARGEST));
  }

  // What a key weighs as a probability.
  DEVICE_FUNCTION u64 weight(u64 key, float most) const {
    return (u64)(exp_f32((value_of((u32)(key >> 32)) - most) / p.temperature) * ONE);
  }

  // Calls f(id, logits) for four tokens after the other of [begin, end), those of one of `threads` threads; LOADS loads at a
  // time. The lanes of a warp call together; behind `end` logits are -inf. Both bounds are multiples of 4, but for `vocab`.
  template <u32 LOADS, class F> DEVICE_FUNCTION void fours(u32 begin, u32 end, u32 thread, u32 threads, F f) const {
    u32 lane = threadIdx.x % 32;
    for (u32 first = begin + 4 * (thread - lane); first < end; first += 4 * threads * LOADS) {
      Four x[LOADS];
#pragma unroll
      for (u32 j = 0; j < LOADS; j++) {
        u32 at = first + 4 * (threads * j + lane);
        float none = __uint_as_float(MINUS_INFINITY);
        x[j] = {{none, none, none, none}};
        // The only column of a matrix is not padded.
        if (at < end) x[j] = vocab > 1 ? load4(logits, F32, at) : Four{{logits[0], none, none, none}};
#pragma unroll
        for (u32 i = 0; i < 4; i++) x[j].x[i] = at + i < end ? x[j].x[i] : none;
      }
#pragma unroll
      for (u32 j = 0; j < LOADS; j++) f(first + 4 * (threads * j + lane), x[j].x);
    }
  }

  // Of four tokens, which share a draw, that one with the largest scaled logit plus Gumbel noise: as a key. Those behind
  // `end` do not run.
  DEVICE_FUNCTION u64 race(u32 id, const u64 (&keys)[4], u64 end, float most) const {
    float floor = p.min_p > 0.0f ? ln_f32(p.min_p) : -LARGEST;
    bool runs[4], any = false;
    float scaled[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      scaled[i] = (value_of((u32)(keys[i] >> 32)) - most) / p.temperature;
      runs[i] = keys[i] <= end && scaled[i] >= floor;
      any |= runs[i];
    }
    u64 best = NO_KEY;
    if (!any) return best;
    Words noise = philox(id / 4, p.position, p.seed_lo, p.seed_hi);
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 word = word_of(__float_as_uint(scaled[i] + gumbel(noise.w[i])));
      if (runs[i]) best = Min::of(best, key_of(word, id + i));
    }
    return best;
  }

  // Of the threads' tokens.
  DEVICE_FUNCTION u64 race_all(u64 end, float most, u32 thread, u32 threads) const {
    u64 best = NO_KEY;
    fours<1>(0, vocab, thread, threads, [&](u32 id, const float (&x)[4]) {
      u64 keys[4];
#pragma unroll
      for (u32 i = 0; i < 4; i++) keys[i] = changed(id + i, x[i]);
      best = Min::of(best, race(id, keys, end, most));
    });
    return best;
  }
};

DEVICE Row row_of(u32 row, const float* logits, const RowParams* params, const u32* mask, const u32* history, u32 vocab,
                  u32 stride) {
  RowParams p = params[row];
  bool penalizes = p.repetition != 1.0f || p.presence != 0.0f || p.frequency != 0.0f;
  const u32* allowed = mask + (size_t)row * ((vocab + 31) / 32);
  return {logits + (size_t)row * stride, history + (size_t)p.seq * vocab, allowed, p, vocab, penalizes};
}

KERNEL(128, 8) sample_parts(const u32* live, const float* logits, const RowParams* params, const u32* mask,
                            const u32* history, Draft* drafts, u32 vocab, u32 stride) {
  dependency_wait();
  if (blockIdx.y >= live[1]) return;
  Row row = row_of(blockIdx.y, logits, params, mask, history, vocab, stride);
  Draft& draft = drafts[blockIdx.y];
  bool changes = row.chooses() && row.changes();
  u32 each = (vocab + 4 * PARTS - 1) / (4 * PARTS) * 4, begin = each * blockIdx.x, bad = 0, id = 0;
  u64 first = NO_KEY;
  float none = __uint_as_float(MINUS_INFINITY), largest = none, sum = 0.0f;
  // Against the largest so far; where there is none, a finite number stands for it.
  auto weight = [](float value, float most) { return exp_f32(value - fmaxf(most, -LARGEST)); };
  row.fours<4>(begin, min(begin + each, vocab), threadIdx.x, blockDim.x, [&](u32 at, const float (&x)[4]) {
    float values[4], before = largest;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      bool is_finite = fabsf(x[i]) <= LARGEST;
      bad += is_finite || x[i] == none ? 0 : 1;
      values[i] = is_finite ? x[i] : none;
      if (values[i] > largest) largest = values[i], id = at + i;
    }
    sum *= weight(before, largest);
#pragma unroll
    for (u32 i = 0; i < 4; i++) sum += weight(values[i], largest);
    if (!changes) return;
#pragma unroll
    for (u32 i = 0; i < 4; i++) first = Min::of(first, row.changed(at + i, x[i]));
  });
  float most = warp_reduce<Max>(largest);
  Group own;
  own.sum = warp_reduce<Add>(sum * weight(largest, most));
  own.best = warp_reduce<Min>(row.key(id, largest));
  own.first = changes ? warp_reduce<Min>(first) : own.best;
  own.bad = warp_reduce<Add>(bad);
  if (threadIdx.x % 32 == 0) draft.groups[blockIdx.x * (GROUPS / PARTS) + threadIdx.x / 32] = own;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    draft.winner = NO_KEY, draft.weight = 0;
    draft.top.count = draft.runners.count = 0;
  }
}
ENTRY(sample_parts)

// Adds a key where `is_in`; the lanes of a warp call together.
DEVICE void append(List& list, u64 key, bool is_in) {
  u32 all = __ballot_sync(0xffffffffu, is_in), lane = threadIdx.x % 32, at = 0;
  if (all == 0) return;
  if (lane == 0) at = atomicAdd(&list.count, (u32)__popc(all));
  at = __shfl_sync(0xffffffffu, at, 0) + __popc(all & ((1u << lane) - 1));
  if (is_in && at < LIST) list.keys[at] = key;
}

// Lists the keys up to the k-th of the groups' first words, of which a thread has one, so that k keys are there; all where
// the groups are too few. `words` has GROUPS + 1 elements of shared memory; all blocks of a row call.
template <class Key> DEVICE void gather(const Row& row, List& list, u32 k, u32 word, u32* words, Key key) {
  if (k > GROUPS && row.vocab > LIST) {
    if (blockIdx.x == 0 && threadIdx.x == 0) list.count = LIST + 1;
    return;
  }
  u32& last = words[GROUPS];
  __syncthreads();
  words[threadIdx.x] = word;
  if (threadIdx.x == 0) last = NO_WORD;
  __syncthreads();
  u32 below = 0, up_to = 0;
#pragma unroll 16
  for (u32 i = 0; i < GROUPS; i++) below += words[i] < word ? 1 : 0, up_to += words[i] <= word ? 1 : 0;
  if (below < k && up_to >= k) last = word;
  __syncthreads();
  row.fours<1>(0, row.vocab, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x,
               [&](u32 id, const float (&x)[4]) {
#pragma unroll
                 for (u32 i = 0; i < 4; i++) {
                   u64 own = key(id + i, x[i]);
                   append(list, own, own != NO_KEY && (u32)(own >> 32) <= last);
                 }
               });
}

KERNEL(256, 4) sample_draft(const u32* live, const float* logits, const RowParams* params, const u32* mask,
                            const u32* history, Draft* drafts, u32 vocab, u32 stride, Sampled* sampled) {
  SHARED(u64, keys, 32);
  SHARED(u32, words, GROUPS + 1);
  dependency_wait();
  if (blockIdx.y >= live[1]) return;
  Row row = row_of(blockIdx.y, logits, params, mask, history, vocab, stride);
  Draft& draft = drafts[blockIdx.y];
  bool is_head = blockIdx.x == 0, is_first = threadIdx.x == 0, cuts = row.cuts(), races = row.races();
  u32 top_n = min(row.p.top_n, (u32)MOST_TOP), thread = blockIdx.x * blockDim.x + threadIdx.x;
  u32 threads = gridDim.x * blockDim.x;
  if (!is_head && !cuts && !races && top_n == 0) return;
  Group own = draft.groups[threadIdx.x];
  u64 best = block_reduce<Min>(own.best, keys), first = block_reduce<Min>(own.first, keys);
  float most = value_of((u32)(first >> 32));
  if (is_head) {
    float weight = exp_f32(value_of((u32)(own.best >> 32)) - value_of((u32)(best >> 32)));
    float sum = block_reduce<Add>(own.best == NO_KEY ? 0.0f : own.sum * weight, (float*)keys);
    u32 bad = block_reduce<Add>(own.bad, words);
    Sampled& out = sampled[blockIdx.y];
    if (is_first) {
      draft.best = best, draft.first = first, draft.log_sum = ln_f32(sum);
      out.token = NO_TOKEN, out.logprob = MINUS_INFINITY, out.rank = 0, out.bad_logits = bad;
    }
    if (threadIdx.x < MOST_TOP) out.top_ids[threadIdx.x] = NO_TOKEN, out.top_logprobs[threadIdx.x] = MINUS_INFINITY;
  }

  if (top_n > 0) {
    gather(row, draft.top, top_n, (u32)(own.best >> 32), words, [&](u32 id, float x) { return row.key(id, x); });
  }
  if (first == NO_KEY) return;
  if (races) {
    u64 winner = block_reduce<Min>(row.race_all(NO_KEY - 1, most, thread, threads), keys);
    if (is_first) atomicMin(&draft.winner, winner);
  }
  if (!cuts) return;
  u64 weight = 0;
  u32 k = row.cuts_count() ? row.p.top_k : LIKELY;
  gather(row, draft.runners, k, (u32)(own.first >> 32), words, [&](u32 id, float x) {
    u64 own = row.changed(id, x);
    if (!row.cuts_count() && own != NO_KEY) weight += row.weight(own, most);
    return own;
  });
  if (row.cuts_count()) return;
  weight = block_reduce<Add>(weight, keys);
  if (is_first) atomicAdd(&draft.weight, weight);
}
ENTRY(sample_draft)

// A list's keys or, where it does not hold them all, those of the vocabulary.
struct Keys {
  const Row& row;
  bool is_listed, is_changed;
  u64 own[2];  // of the list, this thread's

  DEVICE_FUNCTION Keys(const Row& row, const List& list, bool is_changed) : row(row), is_changed(is_changed) {
    is_listed = list.count <= LIST;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      u32 at = threadIdx.x + i * blockDim.x;
      own[i] = is_listed && at < list.count ? list.keys[at] : NO_KEY;
    }
  }

  // Calls f(key) for those of this thread, and for some that are NO_KEY.
  template <class F> DEVICE_FUNCTION void each(F f) const {
    if (is_listed) {
#pragma unroll
      for (u32 i = 0; i < 2; i++) f(own[i]);
      return;
    }
    row.fours<2>(0, row.vocab, threadIdx.x, blockDim.x, [&](u32 id, const float (&x)[4]) {
#pragma unroll
      for (u32 i = 0; i < 4; i++) f(is_changed ? row.changed(id + i, x[i]) : row.key(id + i, x[i]));
    });
  }
};

// A block that chooses.
struct Chooser {
  const Row& row;
  Shared* shared;

  // Adds to a bin; 32 bits at a time, as shared memory has no atomic sum of 64.
  DEVICE_FUNCTION void weigh(u32 bin, u64 weight) const {
    u32 low = (u32)weight, old = atomicAdd(&shared->low[bin], low);
    u32 high = (u32)(weight >> 32) + (old + low < old ? 1 : 0);
    if (high > 0) atomicAdd(&shared->high[bin], high);
    atomicAdd(&shared->counts[bin], 1u);
  }

  // The end of the shortest prefix of the keys up to `end` whose weight reaches wanted(weight of them all), which is
  // above 0; NO_KEY where they do not.
  template <class Weight, class Wanted>
  DEVICE_FUNCTION u64 cut(const Keys& keys, u64 end, Weight weight, Wanted wanted) const {
    // Of the last key all bits from `known` on are; `need` is what keys that share them have still to weigh.
    u64 prefix = 0, need = 0;
    u32 known = 64;
    while (known > 0) {
      u32 shift = known > DIGIT ? known - DIGIT : 0;
      __syncthreads();
      for (u32 i = threadIdx.x; i < BINS; i += blockDim.x) shared->low[i] = shared->high[i] = shared->counts[i] = 0;
      __syncthreads();
      keys.each([&](u64 own) {
        if (own <= end && (known == 64 || own >> known == prefix)) weigh((u32)(own >> shift) % BINS, weight(own));
      });
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
      if (need > all) return NO_KEY;
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

  // The token of a row that cuts; `first` is the first key after mask and penalties. The keys are the vocabulary's in the end
  // where the list was too short.
  DEVICE_FUNCTION u32 choose(Keys& keys, u64 first, u64 all_weight) const {
    float most = value_of((u32)(first >> 32));
    u64 end = NO_KEY - 1, best = NO_KEY;
    if (row.cuts_count()) {
      end = min(end, cut(keys, end, [](u64) { return (u64)1; }, [&](u64) { return (u64)row.p.top_k; }));
    }
    bool is_short = row.cuts_weight();
    while (is_short) {
      auto weight = [&](u64 key) { return row.weight(key, most); };
      u64 last = cut(keys, end, weight, [&](u64 all) {
        if (!row.cuts_count()) all = all_weight;
        return max((u64)ceil((double)row.p.top_p * (double)all), (u64)1);
      });
      end = min(end, last);
      is_short = last == NO_KEY && keys.is_listed;
      if (is_short) keys.is_listed = false;
    }
    if (keys.is_listed) {
#pragma unroll
      for (u32 i = 0; i < 2; i++) {
        u32 id = (u32)keys.own[i];
        u64 four[4] = {NO_KEY, NO_KEY, NO_KEY, NO_KEY};
#pragma unroll
        for (u32 j = 0; j < 4; j++) four[j] = id % 4 == j ? keys.own[i] : NO_KEY;
        best = Min::of(best, row.race(id / 4 * 4, four, end, most));
      }
    } else {
      best = row.race_all(end, most, threadIdx.x, blockDim.x);
    }
    return (u32)block_reduce<Min>(best, shared->keys);
  }

  // The first `count` keys, in any order, in shared->top; how many there are.
  DEVICE_FUNCTION u32 take_top(const Keys& keys, u32 count) const {
    u64 end = min(NO_KEY - 1, cut(keys, NO_KEY - 1, [](u64) { return (u64)1; }, [&](u64) { return (u64)count; }));
    if (threadIdx.x == 0) shared->top_count = 0;
    __syncthreads();
    keys.each([&](u64 own) {
      if (own <= end) shared->top[atomicAdd(&shared->top_count, 1u)] = own;
    });
    __syncthreads();
    return shared->top_count;
  }
};

KERNEL(1024, 1) sample(const u32* live, const float* logits, const RowParams* params, const u32* mask, u32* history,
                       const Draft* drafts, u32 vocab, u32 stride, Sampled* sampled) {
  SHARED(Shared, shared, 1);
  dependency_wait();
  if (blockIdx.y >= live[1]) return;
  Row row = row_of(blockIdx.y, logits, params, mask, history, vocab, stride);
  const Draft& draft = drafts[blockIdx.y];
  Sampled* out = sampled + blockIdx.y;
  Chooser chooser = {row, shared};
  bool is_head = blockIdx.x == 0, is_first = threadIdx.x == 0, cuts = row.cuts();
  u64 best = draft.best, first = draft.first;
  if (best == NO_KEY || (cuts && !is_head)) return;
  float most = value_of((u32)(best >> 32)), log_sum = draft.log_sum;

  if (is_head && row.p.top_n > 0) {
    u32 count = chooser.take_top(Keys(row, draft.top, false), min(row.p.top_n, (u32)MOST_TOP));
    if (threadIdx.x < count) {
      u64 own = shared->top[threadIdx.x];
      u32 place = 0;
      for (u32 i = 0; i < count; i++) place += shared->top[i] < own ? 1 : 0;
      out->top_ids[place] = (u32)own;
      out->top_logprobs[place] = __float_as_uint(value_of((u32)(own >> 32)) - most - log_sum);
    }
  }

  u32 token = row.is_greedy() ? (u32)first : (u32)draft.winner;
  Keys runners(row, draft.runners, true);
  if (!row.chooses()) token = row.p.target;
  if (cuts) token = first == NO_KEY ? NO_TOKEN : chooser.choose(runners, first, draft.weight);
  if (is_head && is_first) {
    out->token = token;
    // Nobody reads the count any more.
    u32* count = history + (size_t)row.p.seq * vocab + token;
    if (row.chooses() && token != NO_TOKEN && (*count & 0x7fffffffu) != 0x7fffffffu) ++*count;
  }
  if (token >= vocab) return;
  u64 own = row.key(token, logits[(size_t)blockIdx.y * stride + token]);
  if (own == NO_KEY) return;
  u32 before = 0;
  if (own != best) {
    if (cuts && !row.changes()) {
      runners.each([&](u64 key) { before += key < own ? 1 : 0; });
    } else {
      u32 blocks = cuts ? 1 : gridDim.x;
      row.fours<4>(0, vocab, blockIdx.x * blockDim.x + threadIdx.x, blocks * blockDim.x,
                   [&](u32 id, const float (&x)[4]) {
#pragma unroll
                     for (u32 i = 0; i < 4; i++) before += row.key(id + i, x[i]) < own ? 1 : 0;
                   });
    }
    before = block_reduce<Add>(before, shared->counts);
  }
  if (!is_first) return;
  if (is_head) out->logprob = __float_as_uint(value_of((u32)(own >> 32)) - most - log_sum), before++;
  // sample_draft has made it 0.
  if (before > 0) atomicAdd(&out->rank, before);
}
ENTRY(sample)
