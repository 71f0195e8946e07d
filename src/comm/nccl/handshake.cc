#include "comm/nccl/handshake.h"

#include <map>
#include <sstream>
#include <utility>

#include "mics/error.h"
#include "plan/check.h"

namespace mics {

std::string version_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

std::string settings_text(const NcclOptions& options) {
  const std::map<NcclRegistration, const char*> names = {{NcclRegistration::kNone, "none"},
                                                         {NcclRegistration::kBuffers, "buffers"},
                                                         {NcclRegistration::kWindows, "windows"}};
  return std::string("registration=") + names.at(options.registration) +
         " copy_engine=" + (options.copy_engine ? "1" : "0") +
         " max_in_flight=" + std::to_string(options.max_in_flight) +
         " max_ctas=" + std::to_string(options.max_ctas) +
         " blocking=" + (options.is_blocking ? "1" : "0");
}

std::string ranks_text(const std::vector<int>& ranks) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int rank : ranks) {
    text << separator << rank;
    separator = " ";
  }
  text << "]";
  return text.str();
}

std::vector<std::string> wait_for_all(c10d::Store& store, const std::string& topic,
                                      const std::vector<int>& ranks, int world_rank,
                                      std::chrono::milliseconds timeout) {
  std::vector<std::string> keys;
  for (const int rank : ranks) keys.push_back(topic + "/" + std::to_string(rank));
  try {
    store.wait(keys, timeout);
  } catch (const std::exception& error) {
    std::vector<int> missing;
    for (size_t i = 0; i < keys.size(); ++i) {
      if (!store.check({keys[i]})) missing.push_back(ranks[i]);
    }
    throw TimeoutError(detail::concatenate(
        "every member must take part in the start of its communicator: got no answer from world "
        "ranks ",
        ranks_text(missing), " within ", timeout.count(), " ms (", topic,
        ", world_rank=", world_rank,
        "). They have ended, or make other communicators; see docs/errors.md#timeouts."));
  }
  std::vector<std::string> values;
  for (const std::string& key : keys) values.push_back(store.get_to_str(key));
  return values;
}

namespace {

struct Hello {
  int version = 0;
  std::string settings;  // must be the same on all ranks
  std::string host;
  std::string bus_id;  // of its device
};

std::string encode(const Hello& hello) {
  return std::to_string(hello.version) + "\n" + hello.settings + "\n" + hello.host + "\n" +
         hello.bus_id;
}

Hello decode(const std::string& text) {
  std::istringstream lines(text);
  Hello hello;
  std::string version;
  std::getline(lines, version);
  std::getline(lines, hello.settings);
  std::getline(lines, hello.host);
  std::getline(lines, hello.bus_id);
  hello.version = std::stoi(version);
  return hello;
}

}  // namespace

void exchange_hellos(c10d::Store& store, const NcclOptions& options, int version,
                     const std::string& bus_id) {
  const Hello mine = {version, settings_text(options), options.host, bus_id};
  store.set("hello/" + std::to_string(options.rank), encode(mine));
  std::vector<int> everyone;
  for (int rank = 0; rank < options.world_size; ++rank) everyone.push_back(rank);
  std::vector<Hello> hellos;
  for (const std::string& text :
       wait_for_all(store, "hello", everyone, options.rank, options.init_timeout)) {
    hellos.push_back(decode(text));
  }
  const Hello& first = hellos.front();
  std::map<std::pair<std::string, std::string>, int> rank_of_device;
  for (int rank = 0; rank < options.world_size; ++rank) {
    const Hello& hello = hellos[static_cast<size_t>(rank)];
    MICS_CHECK(hello.version == first.version, "all ranks must run one version of NCCL: got ",
               version_text(first.version), " on world_rank 0 and ", version_text(hello.version),
               " on world_rank ", rank, ". Install the same torch everywhere.");
    MICS_CHECK(hello.settings == first.settings, "all ranks must ask the same of NCCL: got ",
               first.settings, " on world_rank 0 and ", hello.settings, " on world_rank ", rank,
               ". Give every rank the same NcclOptions.");
    const auto [other, is_new] = rank_of_device.insert({{hello.host, hello.bus_id}, rank});
    MICS_CHECK(is_new, "each rank must have a GPU of its own: got GPU ", hello.bus_id, " of host ",
               hello.host, " on world_rank ", other->second, " and ", rank,
               ". Call torch.cuda.set_device(int(os.environ[\"LOCAL_RANK\"])) before the model is "
               "sharded.");
  }
}

}  // namespace mics
