// Text put together without iostreams.
//
// A compiler that links its C++ library into this module gives the process two copies of it, and a stream of one that meets the
// locale of the other crashes at the first integer (seen with the toolchain of a GPU machine). So nothing here uses them.
#pragma once

#include <concepts>
#include <cstdio>
#include <string>
#include <string_view>
#include <type_traits>

namespace engram_kernels {

class Text {
 public:
  Text& operator<<(std::string_view s) {
    text_ += s;
    return *this;
  }
  Text& operator<<(char c) {
    text_ += c;
    return *this;
  }
  template <class T>
    requires std::is_arithmetic_v<T>
  Text& operator<<(T value) {
    if constexpr (std::is_integral_v<T>) {
      text_ += std::to_string(value);
    } else {
      char digits[32];
      std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(value));
      text_ += digits;
    }
    return *this;
  }

  const std::string& str() const { return text_; }

 private:
  std::string text_;
};

}  // namespace engram_kernels
