// Names for machine addresses, from the debug information, by addr2line of binutils.
#pragma once

#include <string>

namespace simt {

std::string function_name(const void* function);

// "file:line" of a call, followed by where it was inlined, given its return address.
std::string source_line(const void* return_address);

}  // namespace simt
