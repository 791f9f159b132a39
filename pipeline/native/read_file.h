// Reading a whole file into a buffer that is used again.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace regatta {

// The bytes of a file in a buffer that only grows; -1 where it cannot be read or is no regular file. (A pipe would make
// the thread wait for ever, a device might never end.)
inline int64_t read_file(const char* path, std::vector<uint8_t>& bytes) {
  const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return -1;
  struct Closer {
    int file;
    ~Closer() { close(file); }
  } closer{file};
  struct stat facts;
  if (fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode)) return -1;
  // A byte more than it should have, so that one read finds its end.
  const size_t expected = static_cast<size_t>(facts.st_size) + 1;
  if (bytes.size() < expected) bytes.resize(expected);
  size_t used = 0;
  for (;;) {
    const ssize_t got = read(file, bytes.data() + used, bytes.size() - used);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) return static_cast<int64_t>(used);
    used += static_cast<size_t>(got);
    if (used == bytes.size()) bytes.resize(bytes.size() * 2);
  }
}

}  // namespace regatta
