// decode_places, largest_token and accept_tokens: what a decode step does around its layers.
#include <numeric>
#include <random>

#include "bench_common.h"

namespace fusedkv::bench {
namespace {

using f16 = __half;
using bf16 = __nv_bfloat16;

std::mt19937 generator(1);
int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// ---------------------------------------------------------------------------------------- decode_places

struct Places {
  Array<int> positions, table, lens, lengths;
  Array<int64_t> slot_mapping;

  Places(int64_t batch, int max_pages)
      : positions(batch), table(batch * max_pages), lens(batch), lengths(batch), slot_mapping(batch) {}

  void fill(DecodePlacesParams& params) const {
    params.positions = positions.data(), params.slot_mapping = slot_mapping.data();
    params.table = table.data(), params.lens = lens.data(), params.lengths = lengths.data();
  }
};

// Rows of the block table are `gap` entries apart. One sequence of five names a row that is not there.
bool verify_places(int64_t batch, int64_t num_rows, int max_pages, int page_size, int gap, bool all_active) {
  const int64_t stride = max_pages + gap;
  std::vector<int> seq_lens(num_rows), block_table(num_rows * stride, 1 << 30);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t capacity = int64_t{max_pages} * page_size;
    const int64_t length = row % 6 == 4 ? -draw(1, page_size) : row % 6 == 5 ? capacity : draw(0, capacity);
    const int64_t pages = row % 6 == 5 ? max_pages : draw(0, max_pages);
    seq_lens[row] = static_cast<int>(length);
    for (int i = 0; i < max_pages; ++i)
      block_table[row * stride + i] = i < pages ? static_cast<int>(draw(0, 1000000)) : -1;
  }
  std::vector<int64_t> rows(batch), slots(batch);
  std::vector<uint8_t> active(batch);
  std::vector<int> positions(batch), table(batch * max_pages), lens(batch), lengths(batch);
  for (int64_t i = 0; i < batch; ++i) {
    rows[i] = draw(0, 4) > 0 ? draw(0, num_rows - 1) : draw(0, 1) ? num_rows + draw(0, 1) : -draw(1, 5);
    active[i] = draw(0, 3) > 0;
    const bool known = rows[i] >= 0 && rows[i] < num_rows;
    for (int j = 0; j < max_pages; ++j)
      table[i * max_pages + j] = known ? block_table[rows[i] * stride + j] : -1;
    positions[i] = known ? seq_lens[rows[i]] : 0;
    const bool has_place = positions[i] >= 0 && positions[i] / page_size < max_pages;
    const int64_t page = has_place ? table[i * max_pages + positions[i] / page_size] : -1;
    const bool written = page >= 0 && (all_active || active[i]);
    slots[i] = written ? page * page_size + positions[i] % page_size : -1;
    lens[i] = written ? positions[i] + 1 : 0;
    lengths[i] = positions[i] + written;
  }
  const Array<int> device_seq_lens(seq_lens), device_table(block_table);
  const Array<int64_t> device_rows(rows);
  const Array<uint8_t> device_active(active);
  const Places out(batch, max_pages);
  DecodePlacesParams params{
      .batch = batch,
      .num_rows = num_rows,
      .max_pages = max_pages,
      .page_size = page_size,
      .seq_lens = device_seq_lens.data(),
      .block_table = device_table.data(),
      .block_table_stride = stride,
      .rows = device_rows.data(),
      .active = all_active ? nullptr : reinterpret_cast<const bool*>(device_active.data())};
  out.fill(params);
  CUDA_CHECK(run_decode_places(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  const std::string what = "decode_places, " + std::to_string(batch) + " of " + std::to_string(num_rows) +
                           " rows, " + std::to_string(max_pages) + " pages: ";
  return identical(what + "positions", out.positions.host(), positions) &&
         identical(what + "slot_mapping", out.slot_mapping.host(), slots) &&
         identical(what + "table", out.table.host(), table) &&
         identical(what + "lens", out.lens.host(), lens) &&
         identical(what + "lengths", out.lengths.host(), lengths);
}

// ---------------------------------------------------------------------------------------- largest_token

// As the kernel compares: NaN above all, of equals the first.
template <class T>
int64_t first_largest(const T* row, int size) {
  int best = 0;
  for (int i = 1; i < size; ++i) {
    const double x = to_double(row[i]), y = to_double(row[best]);
    if (!std::isnan(y) && (std::isnan(x) || x > y)) best = i;
  }
  return best;
}

// Rows start `offset` elements into the array and are `gap` elements apart; offset and gaps are NaN. Every
// kind of row comes in turn.
template <class T>
bool verify_largest(int64_t batch, int vocab, int offset, int gap) {
  const int64_t stride = vocab + gap;
  auto values = Array<T>::normal(offset + batch * stride, 1).host();
  std::fill_n(values.begin(), offset, T(NAN));
  std::vector<int64_t> expected(batch);
  for (int64_t i = 0; i < batch; ++i) {
    T* const row = values.data() + offset + i * stride;
    std::fill(row + vocab, row + stride, T(NAN));
    const auto put = [&](float x) { row[draw(0, vocab - 1)] = T(x); };
    switch (i % 7) {
      case 0:  // as drawn
        break;
      case 1:  // equals
        for (int k = 0; k < 5; ++k) put(100.0f);
        break;
      case 2:
        for (int k = 0; k < 3; ++k) put(NAN);
        put(INFINITY);
        break;
      case 3:
        std::fill_n(row, vocab, T(-INFINITY));
        break;
      case 4:  // zeros of both signs, above the others
        for (int k = 0; k < vocab; ++k) row[k] = T(-1.0f);
        for (int k = 0; k < 4; ++k) put(k % 2 ? 0.0f : -0.0f);
        break;
      case 5:  // the last, and all below zero
        for (int k = 0; k < vocab; ++k) row[k] = T(-2.0f - k % 3);
        row[vocab - 1] = T(-1.0f);
        break;
      default:  // all equal
        std::fill_n(row, vocab, T(3.0f));
    }
    expected[i] = first_largest(row, vocab);
  }
  const Array<T> logits(values);
  const Array<int64_t> out(batch);
  const LargestTokenParams params{.dtype = dtype_of<T>(),
                                  .batch = batch,
                                  .vocab = vocab,
                                  .logits = logits.data() + offset,
                                  .row_stride = stride,
                                  .out = out.data()};
  CUDA_CHECK(run_largest_token(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  return identical(std::string("largest_token ") + name_of<T>() + " [" + std::to_string(batch) + ", " +
                       std::to_string(vocab) + "]",
                   out.host(), expected);
}

// 300 rows are enough for a CTA each on every GPU.
template <class T>
bool verify_largest_dtype() {
  return verify_largest<T>(0, 5, 0, 0) && verify_largest<T>(14, 1, 0, 0) && verify_largest<T>(14, 7, 3, 2) &&
         verify_largest<T>(7, 1027, 1, 0) && verify_largest<T>(7, 40001, 5, 3) &&
         verify_largest<T>(300, 131, 1, 0) && verify_largest<T>(301, 9, 0, 7);
}

// ---------------------------------------------------------------------------------------- accept_tokens

bool verify_accept(int64_t batch, int64_t steps, int64_t count, int num_stops, bool commits) {
  const int64_t num_rows = batch + 3;
  std::vector<int64_t> chosen(batch), tokens(batch), stops(num_stops), rows(batch), emitted(steps * batch);
  std::vector<uint8_t> active(batch);
  std::vector<int> seq_lens(num_rows), lengths(batch);
  for (auto& x : stops) x = draw(0, 9);
  for (auto& x : emitted) x = draw(100, 200);
  for (auto& x : seq_lens) x = static_cast<int>(draw(0, 100));
  for (int64_t i = 0; i < batch; ++i) {
    chosen[i] = draw(0, 9), tokens[i] = draw(10, 19), active[i] = draw(0, 3) > 0;
    lengths[i] = static_cast<int>(draw(200, 300));
    rows[i] = i % 5 == 3 ? num_rows + i : i % 5 == 4 ? -i : (i * 2 + 1) % num_rows;
  }
  if (num_rows % 2 == 0) std::iota(rows.begin(), rows.end(), 0);  // 2 i + 1 would name a row twice
  const Array<int64_t> device_chosen(chosen), device_stops(stops), device_rows(rows);
  const Array<int64_t> device_tokens(tokens), device_emitted(emitted);
  const Array<int64_t> device_count(std::vector<int64_t>{count});
  const Array<uint8_t> device_active(active);
  const Array<int> device_lens(seq_lens), device_lengths(lengths);
  const AcceptTokensParams params{.batch = batch,
                                  .steps = steps,
                                  .num_stop_tokens = num_stops,
                                  .chosen = device_chosen.data(),
                                  .stop_tokens = device_stops.data(),
                                  .active = reinterpret_cast<bool*>(device_active.data()),
                                  .tokens = device_tokens.data(),
                                  .emitted = device_emitted.data(),
                                  .count = device_count.data(),
                                  .seq_lens = commits ? device_lens.data() : nullptr,
                                  .num_rows = num_rows,
                                  .rows = commits ? device_rows.data() : nullptr,
                                  .lengths = commits ? device_lengths.data() : nullptr};
  CUDA_CHECK(run_accept_tokens(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  for (int64_t i = 0; i < batch; ++i) {
    active[i] &= std::find(stops.begin(), stops.end(), chosen[i]) == stops.end();
    if (active[i]) tokens[i] = chosen[i];
    if (count >= 0 && count < steps) emitted[count * batch + i] = active[i] ? chosen[i] : kDone;
    if (commits && rows[i] >= 0 && rows[i] < num_rows) seq_lens[rows[i]] = lengths[i];
  }
  const std::string what =
      "accept_tokens, " + std::to_string(batch) + " at step " + std::to_string(count) + ": ";
  return identical(what + "active", device_active.host(), active) &&
         identical(what + "tokens", device_tokens.host(), tokens) &&
         identical(what + "emitted", device_emitted.host(), emitted) &&
         identical(what + "count", device_count.host(), {count + 1}) &&
         identical(what + "seq_lens", device_lens.host(), seq_lens);
}

bool verify() {
  struct Shape {
    int batch, pages, page_size;
  };
  for (const auto [batch, pages, page_size] :
       {Shape{0, 1, 1}, Shape{1, 1, 3}, Shape{33, 7, 16}, Shape{90, 700, 64}}) {
    for (const bool all_active : {false, true}) {
      if (!verify_places(batch, 40, pages, page_size, all_active ? 0 : 5, all_active)) return false;
    }
  }
  for (const int64_t batch : {0, 1, 33, 300}) {
    for (const int64_t count : {-1, 0, 2, 3}) {
      for (const int stops : {0, 2}) {
        if (!verify_accept(batch, 3, count, stops, count != 0)) return false;
      }
    }
  }
  return verify_largest_dtype<f16>() && verify_largest_dtype<bf16>() && verify_largest_dtype<float>();
}

// ----------------------------------------------------------------------------------------------- timing

void time_places(const Args& args, int64_t batch, const Ceilings& ceilings, std::vector<Row>& results) {
  const int pages = static_cast<int>(args.integer("pages"));
  const Array<int> seq_lens(std::vector<int>(batch, 64 * (pages - 1)));
  const Array<int> block_table(std::vector<int>(batch * pages, 1));
  std::vector<int64_t> rows(batch);
  std::iota(rows.begin(), rows.end(), 0);
  const Array<int64_t> device_rows(rows);
  const Places out(batch, pages);
  const Timing timing = time_launches(1, args.repeats(), [&](int, cudaStream_t stream) {
    DecodePlacesParams params{.batch = batch,
                              .num_rows = batch,
                              .max_pages = pages,
                              .page_size = 64,
                              .seq_lens = seq_lens.data(),
                              .block_table = block_table.data(),
                              .block_table_stride = pages,
                              .rows = device_rows.data()};
    out.fill(params);
    return run_decode_places(params, stream);
  });
  const std::string shape =
      "decode_places, " + std::to_string(batch) + " x " + std::to_string(pages) + " pages";
  results.push_back({shape, timing, batch * (8.0 * pages + 32), ceilings.copy_gb_s});
}

// Warm: the product that makes the logits has left them in the L2.
void time_largest(const Args& args, int64_t batch, const Ceilings& ceilings, std::vector<Row>& results) {
  const int vocab = static_cast<int>(args.integer("vocab"));
  const auto logits = Array<bf16>::normal(batch * vocab, 1);
  const Array<int64_t> out(batch);
  const Timing timing = time_launches(1, args.repeats(), [&](int, cudaStream_t stream) {
    const LargestTokenParams params{.dtype = DType::kBF16,
                                    .batch = batch,
                                    .vocab = vocab,
                                    .logits = logits.data(),
                                    .row_stride = vocab,
                                    .out = out.data()};
    return run_largest_token(params, stream);
  });
  const std::string shape = "largest_token bf16, " + std::to_string(batch) + " x " + std::to_string(vocab);
  results.push_back({shape, timing, 2.0 * batch * vocab, ceilings.read_gb_s});
}

void time_accept(const Args& args, int64_t batch, const Ceilings& ceilings, std::vector<Row>& results) {
  const std::vector<int64_t> zeros(batch);
  std::vector<int64_t> rows(batch);
  std::iota(rows.begin(), rows.end(), 0);
  const Array<int64_t> chosen(zeros), stops(std::vector<int64_t>{1}), tokens(batch), emitted(batch);
  const Array<int64_t> count(std::vector<int64_t>{0}), device_rows(rows);
  const Array<uint8_t> active(std::vector<uint8_t>(batch, 1));
  const Array<int> seq_lens(batch), lengths(batch);
  const Timing timing = time_launches(1, args.repeats(), [&](int, cudaStream_t stream) {
    const AcceptTokensParams params{.batch = batch,
                                    .steps = 1,  // the launches after the first emit nothing
                                    .num_stop_tokens = 1,
                                    .chosen = chosen.data(),
                                    .stop_tokens = stops.data(),
                                    .active = reinterpret_cast<bool*>(active.data()),
                                    .tokens = tokens.data(),
                                    .emitted = emitted.data(),
                                    .count = count.data(),
                                    .seq_lens = seq_lens.data(),
                                    .num_rows = batch,
                                    .rows = device_rows.data(),
                                    .lengths = lengths.data()};
    return run_accept_tokens(params, stream);
  });
  results.push_back({"accept_tokens, " + std::to_string(batch), timing, 42.0 * batch, ceilings.copy_gb_s});
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) {
  using namespace fusedkv::bench;
  const Args args(argc, argv,
                  "A decode step around its layers: decode_places, largest_token and accept_tokens.",
                  {{"batch", "0", "sequences; 0: sweep 1, 8, 32 and 256"},
                   {"vocab", "128000", "tokens of the vocabulary"},
                   {"pages", "512", "pages of a sequence"}});
  for (const char* name : {"batch", "vocab", "pages"}) {
    const int64_t least = std::string(name) == "batch" ? 0 : 1;
    if (args.integer(name) < least || args.integer(name) > (1 << 24))
      args.fail(std::string("--") + name + ": expected " + std::to_string(least) + " to 2^24, got " +
                args.text(name));
  }
  if (!verify()) return 1;
  std::fprintf(stderr, "verified against the CPU oracle\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> results;
  std::vector<int64_t> batches = {1, 8, 32, 256};
  if (args.integer("batch") > 0) batches = {args.integer("batch")};
  for (const int64_t batch : batches) time_places(args, batch, ceilings, results);
  for (const int64_t batch : batches) time_largest(args, batch, ceilings, results);
  for (const int64_t batch : batches) time_accept(args, batch, ceilings, results);
  print_results(args, "bench_decode_step", ceilings, results);
}
