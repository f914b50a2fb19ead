// Decode attention over a paged cache: one or two sources, few query tokens. Verifies, then times with a
// cold L2.
#include <memory>
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

// One set of buffers. Pages lie in random order; memory that belongs to no token stays NaN.
template <class T>
struct Problem {
  static std::vector<int> shuffled_pages(const Shape& s, int64_t& num_pages) {
    num_pages = 1;
    for (int n : s.lengths) num_pages += ceil_div(n, s.page_size);
    std::vector<int> pages(num_pages);
    for (int64_t i = 0; i < num_pages; ++i) pages[i] = static_cast<int>(i);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(7));
    return pages;
  }

  Problem(const Shape& s, uint64_t seed) : shape(s) {
    const std::vector<int> order = shuffled_pages(s, num_pages);
    max_pages = 1;
    for (int n : s.lengths) max_pages = std::max(max_pages, ceil_div(n, s.page_size));
    table_host.assign(s.lengths.size() * max_pages, 1 << 30);
    size_t next = 0;
    for (size_t b = 0; b < s.lengths.size(); ++b) {
      for (int i = 0; i < ceil_div(s.lengths[b], s.page_size); ++i)
        table_host[b * max_pages + i] = order[next++];
    }
    const size_t batch = s.lengths.size(), heads = size_t(s.hkv) * s.d;
    const size_t cache = num_pages * s.page_size * heads, rows = batch * s.queries * s.hq * s.d;
    for (int i = 0; i < 2 * s.sources; ++i) caches.push_back(Array<T>::normal(cache, seed + i));
    for (int i = 0; i < 2; ++i) weights.push_back(Array<float>::normal(s.sources * heads, seed + 10 + i));
    q = std::make_unique<Array<T>>(Array<T>::normal(rows, seed + 20));
    out = std::make_unique<Array<T>>(rows);
    table = std::make_unique<Array<int>>(table_host);
    seq_lens = std::make_unique<Array<int>>(s.lengths);
    const int row_blocks = num_row_blocks(s.hq, s.hkv, s.queries);
    schedule = std::make_unique<Array<int>>(batch + 1 + batch * s.hkv * row_blocks);
    const FusedAttentionParams params = attention();
    workspace = std::make_unique<Array<uint8_t>>(fused_attention_workspace_bytes(params));
  }

  AttentionScheduleParams split() const {
    return {.batch = static_cast<int>(shape.lengths.size()),
            .num_query_tokens = shape.queries,
            .num_q_heads = shape.hq,
            .num_kv_heads = shape.hkv,
            .window = shape.window,
            .max_seq_len = int64_t(max_pages) * shape.page_size,
            .seq_lens = seq_lens->data(),
            .schedule = schedule->data()};
  }

  FusedAttentionParams attention() const {
    const Shape& s = shape;
    FusedAttentionParams p = {};
    p.dtype = p.cache_dtype = dtype_of<T>();
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
    p.cache = {num_pages, s.page_size};
    p.key_weights = s.weighted ? weights[0].data() : nullptr;
    p.value_weights = s.weighted ? weights[1].data() : nullptr;
    p.block_table = table->data(), p.block_table_stride = p.max_pages = max_pages;
    p.seq_lens = seq_lens->data(), p.schedule = schedule->data();
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.d));
    p.window = s.window;
    p.workspace = workspace ? workspace->data() : nullptr;
    return p;
  }

  Shape shape;
  int64_t num_pages;
  int max_pages;
  std::vector<int> table_host;
  std::vector<Array<T>> caches;
  std::vector<Array<float>> weights;
  std::unique_ptr<Array<T>> q, out;
  std::unique_ptr<Array<int>> table, seq_lens, schedule;
  std::unique_ptr<Array<uint8_t>> workspace;
};

// The definition, in double: form K_i and V_i, softmax, weighted mean. `noise` gets the size of the error
// that rounding the weighted query and the probabilities to T can cause, which grows with the sums, not the
// result.
template <class T>
std::vector<double> oracle(const Problem<T>& problem, double& noise) {
  const Shape& s = problem.shape;
  std::vector<std::vector<T>> caches;
  for (const auto& cache : problem.caches) caches.push_back(cache.host());
  const auto q = problem.q->host();
  const auto a = problem.weights[0].host(), b = problem.weights[1].host();
  std::vector<double> out(q.size(), 0.0);
  const int group = s.hq / s.hkv;
  noise = 0.0;
  for (size_t seq = 0; seq < s.lengths.size(); ++seq) {
    for (int row = 0; row < s.queries * s.hq; ++row) {
      const int token = row / s.hq, head = row % s.hq, kv = head / group;
      const size_t at = (seq * s.queries * s.hq + row) * s.d;
      const int query = s.lengths[seq] - s.queries + token;
      const int first = s.window > 0 ? std::max(0, query - s.window + 1) : 0;
      const auto mixed = [&](bool values, int position, int channel) {
        const int page = problem.table_host[seq * problem.max_pages + position / s.page_size];
        const size_t slot = size_t(page) * s.page_size + position % s.page_size;
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
        for (int c = 0; c < s.d; ++c) score += to_double(q[at + c]) * mixed(false, position, c);
        scores.push_back(score / std::sqrt(double(s.d)));
        best = std::max(best, scores.back());
      }
      for (double& score : scores) total += score = std::exp(score - best);
      for (int c = 0; c < s.d; ++c) {
        double sum = 0.0, size = 0.0;
        for (size_t i = 0; i < scores.size(); ++i) {
          const double term = scores[i] / total * mixed(true, first + static_cast<int>(i), c);
          sum += term, size += std::abs(term);
        }
        out[at + c] = sum;
        noise = std::max(noise, 2.0 * size);
      }
    }
  }
  noise *= epsilon_of<T>();
  return out;
}

template <class T>
bool verify_shape(const Shape& shape) {
  const Problem<T> problem(shape, 100);
  double noise;
  const std::vector<double> expected = oracle(problem, noise);
  const std::string name = std::string("fused_attention ") + name_of<T>() + " " + std::to_string(shape.hq) +
                           "/" + std::to_string(shape.hkv) + "/" + std::to_string(shape.d) + " sources " +
                           std::to_string(shape.sources) + " queries " + std::to_string(shape.queries);
  std::vector<T> first;
  for (int run = 0; run < 2; ++run) {  // the second finds the counters as the first left them
    problem.out->poison();
    CUDA_CHECK(run_attention_schedule(problem.split(), nullptr));
    CUDA_CHECK(run_fused_attention(problem.attention(), nullptr));
    CUDA_CHECK(run_fused_attention(problem.attention(), nullptr));
    CUDA_CHECK(cudaDeviceSynchronize());
    const auto got = problem.out->host();
    if (!matches(name, got, expected, noise)) return false;
    if (run > 0 && !identical(name + ", second run", got, first)) return false;
    first = got;
  }
  return true;
}

template <class T>
bool verify() {
  for (int d : {64, 128})
    for (int sources : {1, 2})
      for (const Shape& s : {Shape{8, 2, d, sources, 1, 16, 0, true, {0, 1, 63, 130, 500}},
                             Shape{2, 2, d, sources, 1, 1, 0, false, {70, 3}},
                             Shape{8, 2, d, sources, 7, 100, 0, true, {9, 205}},
                             Shape{16, 1, d, sources, 5, 64, 40, true, {5, 150}}}) {
        if (!verify_shape<T>(s)) return false;
      }
  return true;
}

Row measure(const Shape& shape, const std::string& name, int repeats, double read_gb_s) {
  const double bytes = 2.0 * shape.sources * shape.tokens() * shape.hkv * shape.d * 2;
  const int sets = cold_sets(static_cast<size_t>(bytes));
  std::vector<Problem<__nv_bfloat16>> problems;
  for (int i = 0; i < sets; ++i) problems.emplace_back(shape, 1000 * i);
  for (const auto& problem : problems) CUDA_CHECK(run_attention_schedule(problem.split(), nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  const Timing timing = time_launches(sets, repeats, [&](int set, cudaStream_t stream) {
    return run_fused_attention(problems[set].attention(), stream);
  });
  const double flops = 4.0 * shape.sources * shape.tokens() * shape.hq * shape.queries * shape.d;
  return {name, timing, bytes, read_gb_s, flops};
}

}  // namespace

int main(int argc, char** argv) {
  const Args args(
      argc, argv, "Decode attention over a paged cache with one or two key and value sources.",
      {{"heads", "32,8,128", "query heads, key/value heads, head dim"},
       {"shapes", "1x4096,1x32768,1x131072,8x8192,32x8192,128x4096", "batch x context tokens, ..."},
       {"sources", "1,2", "numbers of sources to time"},
       {"queries", "1", "query tokens a sequence"},
       {"page-size", "64", "tokens a page"},
       {"window", "0", "sliding window in tokens, 0 for none"}});
  const auto numbers = [&](const std::string& text, const std::string& option, char separator) {
    std::vector<int> values;
    size_t at = 0;
    while (at <= text.size()) {
      const size_t next = std::min(text.find(separator, at), text.size());
      const std::string item = text.substr(at, next - at);
      char* rest = nullptr;
      const long value = std::strtol(item.c_str(), &rest, 10);
      if (item.empty() || *rest != '\0' || value < 1)
        args.fail("--" + option + ": expected positive integers, got '" + text + "'");
      values.push_back(static_cast<int>(value));
      at = next + 1;
    }
    return values;
  };
  const auto heads = numbers(args.text("heads"), "heads", ',');
  if (heads.size() != 3 || heads[0] % heads[1] || (heads[2] != 64 && heads[2] != 128)) {
    args.fail("--heads: expected Hq,Hkv,D with Hq a multiple of Hkv and D 64 or 128, got " +
              args.text("heads"));
  }
  if (args.integer("queries") < 1 || args.integer("queries") > 16) args.fail("--queries: expected 1 to 16");
  if (args.integer("page-size") < 1 || args.integer("window") < 0) {
    args.fail("--page-size: expected at least 1; --window: expected at least 0");
  }
  std::vector<std::vector<int>> batches;
  const std::string& shapes = args.text("shapes");
  for (size_t at = 0; at <= shapes.size();) {
    const size_t next = std::min(shapes.find(',', at), shapes.size());
    const auto pair = numbers(shapes.substr(at, next - at), "shapes", 'x');
    if (pair.size() != 2) args.fail("--shapes: expected batch x tokens, got " + shapes);
    batches.emplace_back(pair[0], pair[1]);
    at = next + 1;
  }
  if (!verify<__half>() || !verify<__nv_bfloat16>()) return 1;
  if (!args.json()) std::printf("verified\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> rows;
  for (int sources : numbers(args.text("sources"), "sources", ',')) {
    if (sources > 2) args.fail("--sources: expected 1 or 2");
    for (const auto& lengths : batches) {
      const Shape shape{heads[0],
                        heads[1],
                        heads[2],
                        sources,
                        static_cast<int>(args.integer("queries")),
                        static_cast<int>(args.integer("page-size")),
                        static_cast<int>(args.integer("window")),
                        sources == 2,
                        lengths};
      const std::string name = args.text("heads") + " " + std::to_string(lengths.size()) + "x" +
                               std::to_string(lengths[0]) + " sources " + std::to_string(sources);
      rows.push_back(measure(shape, name, args.repeats(), ceilings.read_gb_s));
    }
  }
  print_results(args, "fused_attention", ceilings, rows);
  return 0;
}
