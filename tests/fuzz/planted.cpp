// Planted faults for sanitize.py. Each sanitizer must report its own fault, in a library that is built and loaded as
// the real one is.
#include <climits>
#include <thread>

extern "C" {

// AddressSanitizer must report this: a read of one element past the end of an allocation.
__attribute__((visibility("default"))) int address() {
  volatile int count = 4;
  int* held = new int[count]();
  int found = held[count];
  delete[] held;
  return found;
}

// UndefinedBehaviorSanitizer must report this: a signed sum that overflows.
__attribute__((visibility("default"))) int undefined() {
  volatile int large = INT_MAX;
  return large + 1;
}

// ThreadSanitizer must report this: two threads write to the same place without synchronisation.
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
