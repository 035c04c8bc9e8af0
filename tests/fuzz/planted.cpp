// Faults for sanitize.py: each sanitizer must see its own, in a library that is built and loaded as the real one is.
#include <climits>
#include <thread>

extern "C" {

// AddressSanitizer: reads an element behind the end of an allocation.
__attribute__((visibility("default"))) int address() {
  volatile int count = 4;
  int* held = new int[count]();
  int found = held[count];
  delete[] held;
  return found;
}

// UndefinedBehaviorSanitizer: a signed sum that overflows.
__attribute__((visibility("default"))) int undefined() {
  volatile int large = INT_MAX;
  return large + 1;
}

// ThreadSanitizer: two threads write to one place, unordered.
__attribute__((visibility("default"))) int thread() {
  int shared = 0;
  auto add = [&shared] {
    for (int i = 0; i < 1000; ++i) ++shared;
  };
  std::thread other(add);
  add();
  other.join();
  return shared;
}
}
