// Decode attention over a paged cache: one or two sources, few query tokens, f16, bf16 or e4m3. Verifies,
// then times with a cold L2.
#include <memory>
#include <numeric>
#include <random>

#include "bench_common.h"
#include "kernels/schedule.cuh"

using namespace fusedkv;
using namespace fusedkv::bench;

namespace {

struct Shape {
  int hq, hkv, d;
  int sources;  // of keys and of values
  int queries;  // tokens a sequence
  int page_size;
  int window;
  bool weighted;
  std::vector<int> lengths;

  int64_t tokens() const {  // that are read
    int64_t sum = 0;
    for (int n : lengths) sum += window > 0 ? std::min(n, window + queries - 1) : n;
    return sum;
  }
};

// What the layers of one decode step share: lengths, block table and schedule. Pages lie in random order.
struct Batch {
  explicit Batch(const Shape& s) : shape(s) {
    for (int n : s.lengths) {
      num_pages += ceil_div(n, s.page_size);
      max_pages = std::max(max_pages, ceil_div(n, s.page_size));
    }
    std::vector<int> order(num_pages);
    for (int i = 0; i < num_pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    table_host.assign(s.lengths.size() * max_pages, 1 << 30);
    size_t next = 0;
    for (size_t b = 0; b < s.lengths.size(); ++b) {
      for (int i = 0; i < ceil_div(s.lengths[b], s.page_size); ++i)
        table_host[b * max_pages + i] = order[next++];
    }
    table = std::make_unique<Array<int>>(table_host);
    seq_lens = std::make_unique<Array<int>>(s.lengths);
    schedule = std::make_unique<Array<int>>(words_of_schedule(s.lengths.size(), s.queries, s.hq, s.hkv));
    make_schedule();
  }

  void make_schedule() const {
    const AttentionScheduleParams p = {.batch = static_cast<int>(shape.lengths.size()),
                                       .num_query_tokens = shape.queries,
                                       .num_q_heads = shape.hq,
                                       .num_kv_heads = shape.hkv,
                                       .window = shape.window,
                                       .max_seq_len = int64_t(max_pages) * shape.page_size,
                                       .seq_lens = seq_lens->data(),
                                       .schedule = schedule->data()};
    CUDA_CHECK(run_attention_schedule(p, nullptr));
    CUDA_CHECK(cudaDeviceSynchronize());
  }

  Shape shape;
  int64_t num_pages = 1;
  int max_pages = 1;
  std::vector<int> table_host;
  std::unique_ptr<Array<int>> table, seq_lens, schedule;
};

// One layer: its caches of C, fusion weights, queries of T and output.
template <class T, class C>
struct Layer {
  Layer(const Batch& of, uint64_t seed) : batch(of) {
    const Shape& s = of.shape;
    const size_t heads = size_t(s.hkv) * s.d, rows = s.lengths.size() * s.queries * s.hq * s.d;
    for (int i = 0; i < 2 * s.sources; ++i)
      caches.push_back(Array<C>::normal(of.num_pages * s.page_size * heads, seed + i));
    for (int i = 0; i < 2; ++i) weights.push_back(Array<float>::normal(s.sources * heads, seed + 10 + i));
    // Wide scores: a softmax that sees few tokens shows when some are missing.
    q = std::make_unique<Array<T>>(Array<T>::normal(rows, seed + 20, 0.0f, 2.0f));
    out = std::make_unique<Array<T>>(rows);
  }

  // early: as in a model, whose schedule is there long before all but the first layer. keep: the same sources
  // come again.
  FusedAttentionParams attention(bool early = true, bool keep = false) const {
    const Shape& s = batch.shape;
    FusedAttentionParams p = {};
    p.dtype = dtype_of<T>(), p.cache_dtype = dtype_of<C>();
    p.batch = static_cast<int>(s.lengths.size());
    p.num_query_tokens = s.queries, p.num_q_heads = s.hq, p.num_kv_heads = s.hkv, p.head_dim = s.d;
    p.q = q->data(), p.out = out->data();
    p.q_head_stride = s.d, p.q_token_stride = s.hq * s.d, p.q_batch_stride = s.queries * p.q_token_stride;
    p.num_k_sources = p.num_v_sources = s.sources;
    for (int i = 0; i < s.sources; ++i) {
      const int64_t token = int64_t(s.hkv) * s.d;
      p.k_sources[i] = {caches[i].data(), s.page_size * token, token, s.d};
      p.v_sources[i] = {caches[s.sources + i].data(), s.page_size * token, token, s.d};
    }
    p.cache = {batch.num_pages, s.page_size};
    p.key_weights = s.weighted ? weights[0].data() : nullptr;
    p.value_weights = s.weighted ? weights[1].data() : nullptr;
    p.block_table = batch.table->data(), p.block_table_stride = p.max_pages = batch.max_pages;
    p.seq_lens = batch.seq_lens->data(), p.schedule = batch.schedule->data();
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.d));
    p.window = s.window;
    p.early_cache = early, p.keep_sources = keep;
    return p;
  }

  const Batch& batch;
  std::vector<Array<C>> caches;
  std::vector<Array<float>> weights;
  std::unique_ptr<Array<T>> q, out;
};

// The definition, in double: form K_i and V_i, softmax, weighted mean. `noise` gets the size of the error
// that rounding the weighted query and the probabilities can cause (to T, or to f16 with an e4m3 cache),
// which grows with the sums, not the result.
template <class T, class C>
std::vector<double> oracle(const Layer<T, C>& layer, double& noise) {
  const Batch& batch = layer.batch;
  const Shape& s = batch.shape;
  std::vector<std::vector<C>> caches;
  for (const auto& cache : layer.caches) caches.push_back(cache.host());
  const auto q = layer.q->host();
  const auto a = layer.weights[0].host(), b = layer.weights[1].host();
  std::vector<double> out(q.size(), 0.0);
  const int group = s.hq / s.hkv;
  noise = 0.0;
  for (size_t seq = 0; seq < s.lengths.size(); ++seq) {
    for (int row = 0; row < s.queries * s.hq; ++row) {
      const int token = row / s.hq, head = row % s.hq, kv = head / group;
      const size_t at = (seq * s.queries * s.hq + row) * s.d;
      const int query = s.lengths[seq] - s.queries + token;
      const int first = s.window > 0 ? std::max(0, query - s.window + 1) : 0;
      const auto slot_of = [&](int position) {
        const int page = batch.table_host[seq * batch.max_pages + position / s.page_size];
        return size_t(page) * s.page_size + position % s.page_size;
      };
      const auto mixed = [&](bool values, size_t slot, int channel) {
        double sum = 0.0;
        for (int i = 0; i < s.sources; ++i) {
          const double w = s.weighted ? (values ? b : a)[(i * s.hkv + kv) * s.d + channel] : 1.0;
          sum += w * to_double(caches[values * s.sources + i][(slot * s.hkv + kv) * s.d + channel]);
        }
        return sum;
      };
      std::vector<double> scores;
      double best = -INFINITY, total = 0.0;
      for (int position = first; position <= query; ++position) {
        double score = 0.0;
        const size_t slot = slot_of(position);
        for (int c = 0; c < s.d; ++c) score += to_double(q[at + c]) * mixed(false, slot, c);
        scores.push_back(score / std::sqrt(double(s.d)));
        best = std::max(best, scores.back());
      }
      for (double& score : scores) total += score = std::exp(score - best);
      std::vector<double> size(s.d, 0.0);
      for (size_t i = 0; i < scores.size(); ++i) {
        const size_t slot = slot_of(first + static_cast<int>(i));
        for (int c = 0; c < s.d; ++c) {
          const double term = scores[i] / total * mixed(true, slot, c);
          out[at + c] += term, size[c] += std::abs(term);
        }
      }
      for (const double x : size) noise = std::max(noise, 2.0 * x);
    }
  }
  noise *= std::is_same_v<C, __nv_fp8_e4m3> ? epsilon_of<__half>() : epsilon_of<T>();
  return out;
}

template <class T, class C>
bool verify_shape(const Shape& shape) {
  const Batch batch(shape);
  const Layer<T, C> layer(batch, 100);
  double noise;
  const std::vector<double> expected = oracle(layer, noise);
  const std::string name = std::string("fused_attention ") + name_of<T>() + " over " + name_of<C>() + " " +
                           std::to_string(shape.hq) + "/" + std::to_string(shape.hkv) + "/" +
                           std::to_string(shape.d) + " sources " + std::to_string(shape.sources) +
                           " queries " + std::to_string(shape.queries);
  std::vector<T> first;
  const auto schedule = batch.schedule->host();
  for (int run = 0; run < 2; ++run) {
    layer.out->poison();
    CUDA_CHECK(run_fused_attention(layer.attention(false, true), nullptr));
    CUDA_CHECK(run_fused_attention(layer.attention(), nullptr));
    CUDA_CHECK(cudaDeviceSynchronize());
    const auto got = layer.out->host();
    if (!matches(name, got, expected, noise)) return false;
    if (!identical(name + ", the schedule afterwards", batch.schedule->host(), schedule)) return false;
    if (run > 0 && !identical(name + ", second run", got, first)) return false;
    first = got;
  }
  return true;
}

template <class T, class C>
bool verify() {
  for (int d : {64, 128})
    for (int sources : {1, 2})
      for (const Shape& s : {Shape{8, 2, d, sources, 1, 16, 0, true, {0, 1, 63, 130, 500}},
                             Shape{2, 2, d, sources, 1, 1, 0, false, {70, 3}},
                             Shape{7, 1, d, sources, 1, 16, 0, true, {3000, 40}},
                             Shape{16, 1, d, sources, 1, 64, 100, true, {64, 1000}},
                             Shape{16, 1, d, sources, 3, 64, 0, true, {2000}},  // merged apart
                             Shape{8, 2, d, sources, 7, 100, 0, true, {9, 205}},
                             Shape{16, 1, d, sources, 5, 64, 40, true, {5, 150}},
                             // 15, 24, 32, 44 and 64 rows a head; more would be two row blocks, as above.
                             Shape{6, 2, d, sources, 5, 16, 0, true, {700, 5, 129}},
                             Shape{4, 2, d, sources, 12, 64, 50, true, {12, 500}},
                             Shape{8, 2, d, sources, 8, 64, 0, true, {8, 63, 1500, 300}},
                             Shape{4, 1, d, sources, 11, 24, 0, false, {40, 500}},
                             Shape{8, 2, d, sources, 16, 64, 0, true, {17, 1200}}}) {
        if (!verify_shape<T, C>(s)) return false;
      }
  return true;
}

// Batches with so many units of 64 KB for each worker. With f16 queries, because the split does not depend on
// their dtype and f16 has the smaller noise.
template <class C>
bool verify_large() {
  struct Case {
    int hq, hkv, sources, sequences, units;
  };
  int device, multiprocessors;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  // Heads in step, more units than the ring has stages; some sequences, of several rounds of the ring, for
  // each worker; on 132 multiprocessors 48 heads do not go in step; a partial result of each worker, merged
  // in groups.
  for (const Case& c : {Case{8, 8, 1, 3, 8}, Case{2, 2, 2, multiprocessors, 20}, Case{48, 48, 1, 5, 8},
                        Case{8, 1, 1, 1, 3}}) {
    const int64_t token_bytes = 2 * c.sources * c.hkv * 128 * sizeof(C);
    const int64_t tokens = int64_t(multiprocessors) * c.units * 65536 / token_bytes;
    std::vector<int> weights;
    for (int i = 0; i < c.sequences; ++i) weights.push_back(1 + i % 7);
    const int total = std::accumulate(weights.begin(), weights.end(), 0);
    Shape shape{c.hq, c.hkv, 128, c.sources, 1, 64, 0, true, {}};
    for (const int weight : weights) shape.lengths.push_back(static_cast<int>(tokens * weight / total));
    if (!verify_shape<__half, C>(shape)) return false;
  }
  return true;
}

template <class T, class C>
Row measure(const Shape& shape, const std::string& name, int repeats, double read_gb_s) {
  const double bytes = 2.0 * shape.sources * shape.tokens() * shape.hkv * shape.d * sizeof(C);
  const int sets = cold_sets(static_cast<size_t>(bytes));
  const Batch batch(shape);
  std::vector<Layer<T, C>> layers;
  for (int i = 0; i < sets; ++i) layers.emplace_back(batch, 1000 * i);
  const Timing timing = time_launches(sets, repeats, [&](int set, cudaStream_t stream) {
    return run_fused_attention(layers[set].attention(), stream);
  });
  const double flops = 4.0 * shape.sources * shape.tokens() * shape.hq * shape.queries * shape.d;
  return {name, timing, bytes, read_gb_s, flops};
}

// Comma-separated positive integers.
std::vector<int> numbers(const Args& args, const std::string& option, const std::string& text) {
  std::vector<int> values;
  for (const std::string& item : split(text, ',')) {
    char* rest = nullptr;
    const long value = std::strtol(item.c_str(), &rest, 10);
    if (item.empty() || *rest != '\0' || value < 1 || value > 1 << 30)
      args.fail("--" + option + ": expected positive integers, got '" + text + "'");
    values.push_back(static_cast<int>(value));
  }
  return values;
}

// "32x8192" is 32 sequences of 8192 tokens, "1x65536+31x512" a ragged batch.
std::vector<int> parse_batch(const Args& args, const std::string& text) {
  std::vector<int> lengths;
  for (const std::string& part : split(text, '+')) {
    const size_t by = part.find('x');
    if (by == std::string::npos) args.fail("--shapes: expected batch x tokens, got '" + text + "'");
    const int batch = numbers(args, "shapes", part.substr(0, by))[0];
    lengths.insert(lengths.end(), batch, numbers(args, "shapes", part.substr(by + 1))[0]);
  }
  return lengths;
}

}  // namespace

int main(int argc, char** argv) {
  const Args args(
      argc, argv, "Decode attention over a paged cache with one or two key and value sources.",
      {{"heads", "32,8,128", "query heads, key/value heads, head dim"},
       {"shapes", "1x4096,1x32768,1x131072,8x8192,32x8192,128x4096", "batch x tokens, + for ragged batches"},
       {"sources", "1,2", "numbers of sources to time"},
       {"queries", "1", "numbers of query tokens a sequence to time"},
       {"dtype", "bf16", "of the queries to time: bf16 or f16"},
       {"verify-dtypes", "bf16,f16", "of the queries to verify; large batches with f16 alone"},
       {"cache-dtypes", "same,e4m3", "of the sources to verify and time: same as the queries', e4m3"},
       {"page-size", "64", "tokens a page"},
       {"window", "0", "sliding window in tokens, 0 for none"}});
  const auto heads = numbers(args, "heads", args.text("heads"));
  if (heads.size() != 3 || heads[0] % heads[1] || (heads[2] != 64 && heads[2] != 128)) {
    args.fail("--heads: expected Hq,Hkv,D with Hq a multiple of Hkv and D 64 or 128, got " +
              args.text("heads"));
  }
  const auto sources = numbers(args, "sources", args.text("sources"));
  for (int count : sources)
    if (count > 2) args.fail("--sources: expected 1 or 2, got " + args.text("sources"));
  const auto queries = numbers(args, "queries", args.text("queries"));
  for (int count : queries)
    if (count > 16) args.fail("--queries: expected 1 to 16, got " + args.text("queries"));
  const int page_size = numbers(args, "page-size", args.text("page-size"))[0];
  if (args.integer("window") < 0) args.fail("--window: expected at least 0, got " + args.text("window"));
  const std::string dtype = args.text("dtype");
  if (dtype != "bf16" && dtype != "f16") args.fail("--dtype: expected bf16 or f16, got " + dtype);
  const auto verify_dtypes = split(args.text("verify-dtypes"), ',');
  for (const std::string& each : verify_dtypes) {
    if (each != "bf16" && each != "f16") args.fail("--verify-dtypes: expected bf16 or f16, got " + each);
  }
  const auto cache_dtypes = split(args.text("cache-dtypes"), ',');
  for (const std::string& cache : cache_dtypes) {
    if (cache != "same" && cache != "e4m3") args.fail("--cache-dtypes: expected same or e4m3, got " + cache);
  }
  std::vector<std::pair<std::string, std::vector<int>>> batches;
  for (const std::string& text : split(args.text("shapes"), ','))
    batches.emplace_back(text, parse_batch(args, text));

  using bf16 = __nv_bfloat16;
  using e4m3 = __nv_fp8_e4m3;
  for (const std::string& each : verify_dtypes)
    for (const std::string& cache : cache_dtypes) {
      const auto right = [&]<class T>(T) { return cache == "same" ? verify<T, T>() : verify<T, e4m3>(); };
      const auto large = [&] { return cache == "same" ? verify_large<__half>() : verify_large<e4m3>(); };
      if (!(each == "bf16" ? right(bf16{}) : right(__half{}) && large())) return 1;
    }
  if (!args.json()) std::printf("verified\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> rows;
  for (const std::string& cache : cache_dtypes)
    for (int count : sources)
      for (int tokens : queries)
        for (const auto& [text, lengths] : batches) {
          const Shape shape{heads[0],
                            heads[1],
                            heads[2],
                            count,
                            tokens,
                            page_size,
                            static_cast<int>(args.integer("window")),
                            count == 2 || cache == "e4m3",
                            lengths};
          const std::string name = args.text("heads") + " " + text + " sources " + std::to_string(count) +
                                   " " + (cache == "same" ? dtype : cache) + " queries " +
                                   std::to_string(tokens);
          const auto time = [&]<class T>(T) {
            return cache == "same" ? measure<T, T>(shape, name, args.repeats(), ceilings.read_gb_s)
                                   : measure<T, e4m3>(shape, name, args.repeats(), ceilings.read_gb_s);
          };
          rows.push_back(dtype == "bf16" ? time(bf16{}) : time(__half{}));
        }
  print_results(args, "fused_attention", ceilings, rows);
  return 0;
}
