// Where prepared calls are kept, by number: a number that was released is an error, not a wild pointer.
#include "prepared.h"

#include <mutex>
#include <unordered_map>

namespace fastadapter {
namespace {

struct Store {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Prepared>> calls;
  int64_t next = 1;
};

Store& store() {
  static Store* const instance = new Store;  // never destroyed: Python may release calls when it ends
  return *instance;
}

int64_t release(int64_t number) {
  std::shared_ptr<const Prepared> last;  // freed without the lock
  const std::lock_guard<std::mutex> lock(store().mutex);
  const auto found = store().calls.find(number);
  if (found == store().calls.end()) return 0;
  last = std::move(found->second);
  store().calls.erase(found);
  return 1;
}

Tensor repeat(const Tensor& x, int64_t number) { return kept(number)->run(x, nullptr); }

Tensor repeat_two(const Tensor& x, const Tensor& other, int64_t number) {
  return kept(number)->run(x, &other);
}

}  // namespace

int64_t keep(std::shared_ptr<const Prepared> call) {
  const std::lock_guard<std::mutex> lock(store().mutex);
  store().calls.emplace(store().next, std::move(call));
  return store().next++;
}

std::shared_ptr<const Prepared> kept(int64_t number) {
  const std::lock_guard<std::mutex> lock(store().mutex);
  const auto found = store().calls.find(number);
  STD_TORCH_CHECK(found != store().calls.end(), "there is no prepared call ", number,
                  ": its adapter was changed or detached");
  return found->second;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastadapter, m) {
  m.def("release(int number) -> int");
  m.def("repeat(Tensor x, int number) -> Tensor");
  m.def("repeat_two(Tensor x, Tensor other, int number) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CompositeExplicitAutograd, m) {
  m.impl("release", TORCH_BOX(&release));
}

STABLE_TORCH_LIBRARY_IMPL(fastadapter, CPU, m) {
  m.impl("repeat", TORCH_BOX(&repeat));
  m.impl("repeat_two", TORCH_BOX(&repeat_two));
}

}  // namespace fastadapter
