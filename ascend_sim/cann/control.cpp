// A unix socket in the abstract namespace, "\0ascend-sim-<pid>": it has no file, so nothing is left after a
// crash. A request is a line of words, an answer is a line of JSON. A pattern is that of fnmatch(3).
//
//   list                                           what streams and host threads do
//   history FROM                                   what tasks did, from that entry on
//   hold PATTERN [COUNT]                           tasks (the next COUNT) stop at a gate before they run
//   release GATE                                   they go on
//   delay PATTERN MICROSECONDS                     tasks take that much longer; 0 takes the rule away
//   links US_PER_MESSAGE MB_PER_S EAGER_BYTES      between devices
#include "control.h"

#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "gates.h"
#include "json.h"
#include "listing.h"
#include "sim.h"

namespace sim {
namespace {

constexpr std::size_t longest_request = 4096;

// Thrown at what cannot be understood; the text is the answer.
struct BadRequest {
  std::string why;
};

std::uint64_t number_in(const std::string& word) {
  std::uint64_t number = 0;
  const char* const end = word.data() + word.size();
  const auto [stopped, error] = std::from_chars(word.data(), end, number);
  if (error != std::errc() || stopped != end) throw BadRequest{"not a number: " + word};
  return number;
}

using Words = std::vector<std::string>;

std::string done() { return json::object({}); }

std::string hold(const Words& words) {
  std::optional<std::uint64_t> count;
  if (words.size() == 3) count = number_in(words[2]);
  return json::object({{"gate", std::to_string(close_gate(words[1], count))}});
}

std::string release(const Words& words) {
  if (!open_gate(static_cast<int>(number_in(words[1])))) throw BadRequest{"no gate " + words[1]};
  return done();
}

std::string delay(const Words& words) {
  delay_tasks(words[1], std::chrono::microseconds(number_in(words[2])));
  return done();
}

std::string set_links(const Words& words) {
  links().us_per_message = static_cast<long>(number_in(words[1]));
  links().mb_per_s = static_cast<long>(number_in(words[2]));
  links().eager_bytes = static_cast<long>(number_in(words[3]));
  return done();
}

std::string answer_to(const Words& words) {
  const auto is = [&](const char* name, std::size_t arguments) {
    return words.size() == arguments + 1 && words[0] == name;
  };
  if (is("list", 0)) return listing();
  if (is("history", 1)) return history_listing(number_in(words[1]));
  if (is("hold", 1) || is("hold", 2)) return hold(words);
  if (is("release", 1)) return release(words);
  if (is("delay", 2)) return delay(words);
  if (is("links", 3)) return set_links(words);
  throw BadRequest{"not a request"};
}

std::string answer_to_line(const std::string& line) {
  std::istringstream stream(line);
  Words words;
  for (std::string word; stream >> word;) words.push_back(word);
  try {
    return answer_to(words);
  } catch (const BadRequest& bad) {
    return json::object({{"error", json::text(bad.why + ": " + line)}});
  }
}

bool send_all(int connection, const std::string& data) {
  std::size_t sent = 0;
  while (sent < data.size()) {
    const ssize_t bytes = send(connection, data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0) return false;
    sent += bytes;
  }
  return true;
}

bool is_of_the_same_user(int connection) {
  ucred peer{};
  socklen_t size = sizeof peer;
  return getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == getuid();
}

// Takes the lines that are complete out of what was received. False when nobody listens any longer.
bool answer_lines(int connection, std::string& received) {
  for (;;) {
    const std::size_t end = received.find('\n');
    if (end == std::string::npos) return true;
    if (!send_all(connection, answer_to_line(received.substr(0, end)) + "\n")) return false;
    received.erase(0, end + 1);
  }
}

void serve_connection(int connection) {
  std::string received;
  while (received.size() < longest_request) {
    char bytes[1024];
    const ssize_t count = recv(connection, bytes, sizeof bytes, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    received.append(bytes, count);
    if (!answer_lines(connection, received)) break;
  }
  close(connection);
}

void accept_connections(int listener) {
  pthread_setname_np(pthread_self(), "control socket");
  for (;;) {
    const int connection = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (connection < 0) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      return;
    }
    if (is_of_the_same_user(connection)) {
      std::thread(serve_connection, connection).detach();
    } else {
      close(connection);
    }
  }
}

int listen_at(const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  name.copy(address.sun_path + 1, sizeof address.sun_path - 1);  // the leading zero makes it abstract
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(listener, 8) != 0) {
    not_simulated(("a process whose control socket " + name + " cannot be opened").c_str());
  }
  return listener;
}

}  // namespace

void serve_control_socket() {
  const int listener = listen_at("ascend-sim-" + std::to_string(getpid()));
  // Threads inherit the mask: signals are for the threads of the interpreter.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread(accept_connections, listener).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace sim
