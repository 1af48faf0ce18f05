// Calls a server in each way that a user does, compares every answer byte by byte, and prints the outcomes as JSON.
//
// verify ADDRESS FOLDER CALLS [AUTHORITY.pem]. gRPC 1.51 or later.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

using std::chrono::milliseconds;
using Jobs = std::vector<std::function<void()>>;

const std::string kService = "/inference.GRPCInferenceService/";
const std::string kMark = "########";  // where a call's id goes
const milliseconds kPatience{60000};
const std::vector<std::string> kLarge{"large4", "large8", "large16"};

std::mutex lock;
std::map<std::string, std::map<std::string, int>> found;
std::map<std::string, std::string> files;
std::atomic<int> ids{50000000};
std::unique_ptr<grpc::GenericStub> stub;

void note(const std::string& check, const std::string& outcome) {
  std::lock_guard<std::mutex> held(lock);
  ++found[check][outcome];
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string{std::istreambuf_iterator<char>(file), {}};
}

std::pair<std::string, std::string> wanted(const std::string& name, const std::string& answer) {
  const std::string id = std::to_string(ids++);
  std::string request = files.at(name + ".request"), response = files.at(name + "." + answer);
  request.replace(request.find(kMark), kMark.size(), id);
  response.replace(response.find(kMark), kMark.size(), id);
  return {request, response};
}

grpc::ByteBuffer buffer(const std::string& bytes) {
  grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

std::string bytes(const grpc::ByteBuffer& message) {
  std::vector<grpc::Slice> slices;
  std::string all;
  if (message.Dump(&slices).ok())
    for (const auto& slice : slices) all.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  return all;
}

void prepare(grpc::ClientContext* context, milliseconds timeout) {
  std::string all(256, 0);
  for (int i = 0; i < 256; ++i) all[i] = char(i);
  context->AddMetadata("x-trace", "a b,c");
  context->AddMetadata("x-token-bin", all);
  context->set_deadline(std::chrono::system_clock::now() + timeout);
}

void unary(const std::string& check, const std::string& name, milliseconds timeout = kPatience,
           milliseconds cancel_after = milliseconds(-1), grpc_compression_algorithm how = GRPC_COMPRESS_NONE) {
  const auto [request, response] = wanted(name, "response");
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  prepare(&context, timeout);
  context.set_compression_algorithm(how);
  grpc::ByteBuffer answer;
  grpc::Status status;
  auto call = stub->PrepareUnaryCall(&context, kService + "ModelInfer", buffer(request), &queue);
  call->StartCall();
  call->Finish(&answer, &status, nullptr);
  void* tag;
  bool fine;
  if (cancel_after.count() >= 0) {
    std::this_thread::sleep_for(cancel_after);
    context.TryCancel();
  }
  queue.Next(&tag, &fine);
  if (!status.ok()) {
    note(check, std::to_string(status.error_code()));
  } else {
    note(check, bytes(answer) == response ? "answered" : "wrong");
  }
}

void stream(const std::string& check, const std::vector<std::string>& names) {
  std::vector<std::pair<std::string, std::string>> pairs;
  for (const auto& name : names) pairs.push_back(wanted(name, "streamed"));
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  prepare(&context, kPatience);
  auto call = stub->PrepareCall(&context, kService + "ModelStreamInfer", &queue);
  enum : long { kStart = 1, kWrite, kRead, kFinish };
  call->StartCall(reinterpret_cast<void*>(kStart));
  grpc::ByteBuffer answer;
  grpc::Status status;
  size_t sent = 0, got = 0;
  void* tag;
  bool fine;
  auto write = [&] {
    if (sent < pairs.size()) {
      call->Write(buffer(pairs[sent++].first), reinterpret_cast<void*>(kWrite));
    } else if (sent++ == pairs.size()) {
      call->WritesDone(reinterpret_cast<void*>(kWrite));
    }
  };
  while (queue.Next(&tag, &fine)) {
    const long what = reinterpret_cast<long>(tag);
    if (what == kStart && fine) {
      write();
      call->Read(&answer, reinterpret_cast<void*>(kRead));
    } else if (what == kWrite && fine) {
      write();
    } else if (what == kRead && fine) {
      note(check, got < pairs.size() && bytes(answer) == pairs[got].second ? "answered" : "wrong");
      ++got;
      call->Read(&answer, reinterpret_cast<void*>(kRead));
    } else if (what == kStart || what == kRead) {
      call->Finish(&status, reinterpret_cast<void*>(kFinish));
    } else if (what == kFinish) {
      break;
    }
  }
  queue.Shutdown();
  while (queue.Next(&tag, &fine)) {
  }
  if (!status.ok()) note(check, std::to_string(status.error_code()));
  if (status.ok() && got != pairs.size()) note(check, "ended after " + std::to_string(got));
}

void side_by_side(Jobs jobs, int count = 8) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&] {
      for (size_t mine; (mine = next++) < jobs.size();) jobs[mine]();
    });
  }
  for (auto& thread : threads) thread.join();
}

Jobs smalls(const std::string& check, int count, grpc_compression_algorithm how = GRPC_COMPRESS_NONE) {
  Jobs jobs;
  for (int i = 0; i < count; ++i)
    jobs.push_back([=] { unary(check, "small" + std::to_string(i % 8), kPatience, milliseconds(-1), how); });
  return jobs;
}

int main(int count, char** argv) {
  const int calls = std::stoi(argv[3]);
  for (const auto& entry : std::filesystem::directory_iterator(argv[2]))
    files[entry.path().filename()] = read(entry.path());
  grpc::ChannelArguments options;
  options.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  options.SetMaxReceiveMessageSize(-1);
  options.SetMaxSendMessageSize(-1);
  auto security = count > 4 ? grpc::SslCredentials({read(argv[4]), "", ""}) : grpc::InsecureChannelCredentials();
  auto channel = grpc::CreateCustomChannel(argv[1], security, options);
  if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(30))) return 1;
  stub = std::make_unique<grpc::GenericStub>(channel);
  std::mt19937 random(1);
  side_by_side(smalls("unary", calls));
  for (auto [check, how] : {std::pair{"gzip", GRPC_COMPRESS_GZIP}, std::pair{"deflate", GRPC_COMPRESS_DEFLATE}}) {
    Jobs jobs = smalls(check, calls / 4, how);
    jobs.push_back([check = check, how = how] { unary(check, "large4", kPatience, milliseconds(-1), how); });
    side_by_side(jobs);
  }
  Jobs jobs;
  for (int i = 0; i < 9; ++i) jobs.push_back([=] { unary("large", kLarge[i % 3]); });
  side_by_side(jobs, 3);
  std::vector<std::string> names;
  for (int i = 0; i < calls / 4; ++i) names.push_back("small" + std::to_string(i % 8));
  side_by_side(Jobs(4, [&] { stream("stream", names); }), 4);
  std::vector<std::string> twice = kLarge;
  twice.insert(twice.end(), kLarge.begin(), kLarge.end());
  if (files.count("large4.streamed")) side_by_side(Jobs(2, [&] { stream("large stream", twice); }), 2);
  jobs = smalls("beside deadlines", 80);
  for (int i = 0; i < 40; ++i) {
    const milliseconds timeout(1 + random() % 20);
    jobs.push_back([=] { unary("deadlines", "slow", timeout); });
  }
  std::shuffle(jobs.begin(), jobs.end(), random);
  side_by_side(jobs);
  jobs = smalls("beside cancels", 80);
  const std::vector<std::string> kinds{"slow", "large4", "small0"};
  for (int i = 0; i < 120; ++i) jobs.push_back([=] { unary("cancels", kinds[i % 3], kPatience, milliseconds(i % 6)); });
  std::shuffle(jobs.begin(), jobs.end(), random);
  side_by_side(jobs);
  const std::vector<std::vector<std::string>> wrong{{"missing model", "missing", "ModelInfer"},
                                                    {"missing method", "missing", "NoMethod"},
                                                    {"oversized", "oversized", "ModelInfer"}};
  for (const auto& words : wrong) {
    grpc::CompletionQueue queue;
    grpc::ClientContext context;
    grpc::ByteBuffer answer;
    grpc::Status status;
    const grpc::ByteBuffer request = buffer(files.at(words[1] + ".request"));
    auto call = stub->PrepareUnaryCall(&context, kService + words[2], request, &queue);
    call->StartCall();
    call->Finish(&answer, &status, nullptr);
    void* tag;
    bool fine;
    queue.Next(&tag, &fine);
    note(words[0], std::to_string(status.error_code()));
  }
  side_by_side(smalls("after all", 80));
  std::cout << "{";
  const char* between = "";
  for (const auto& [check, outcomes] : found) {
    std::cout << between << '"' << check << "\": {";
    between = "";
    for (const auto& [outcome, times] : outcomes) {
      std::cout << between << '"' << outcome << "\": " << times;
      between = ", ";
    }
    std::cout << "}";
    between = ", ";
  }
  std::cout << "}" << std::endl;
}
