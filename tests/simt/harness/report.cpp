#include "report.h"

#include <dlfcn.h>
#include <stdio.h>

#include <cstdint>
#include <sstream>
#include <vector>

namespace simt {

// Lines that addr2line prints for an address of this library; none without addr2line.
static std::vector<std::string> addr2line(const char* options, const void* address) {
  Dl_info library;
  if (!dladdr(address, &library)) return {};
  std::ostringstream command;
  command << "addr2line " << options << " -e '" << library.dli_fname << "' " << std::hex
          << reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(library.dli_fbase) << " 2>/dev/null";
  std::vector<std::string> lines;
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    std::string text;
    for (int c; (c = fgetc(pipe)) != EOF;) text += static_cast<char>(c);
    pclose(pipe);
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) lines.push_back(line);
  }
  return lines;
}

std::string function_name(const void* function) {
  const auto lines = addr2line("-Cf", function);
  return lines.empty() ? "?" : lines[0];
}

std::string source_line(const void* return_address) {
  std::string place;
  for (const auto& line : addr2line("-i", static_cast<const char*>(return_address) - 1)) {
    place += (place.empty() ? "" : " in ") + line.substr(0, line.find(' '));
  }
  return place.empty() ? "?" : place;
}

}  // namespace simt
