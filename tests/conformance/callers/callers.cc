// Calls servers by turns (round_robin, no health checks, no retries asked for) from many threads until standard input
// ends, then prints how many calls were answered and how many failed, by text, as JSON.
//
// callers ADDRESS,ADDRESS... REQUEST_FILE CALLERS, where the file has the message of a ModelInfer. gRPC 1.51 or later.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

int main(int, char** argv) {
  std::ifstream file(argv[2], std::ios::binary);
  const std::string request{std::istreambuf_iterator<char>(file), {}};
  grpc::ChannelArguments options;
  options.SetLoadBalancingPolicyName("round_robin");
  options.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  auto channel = grpc::CreateCustomChannel(std::string("ipv4:") + argv[1], grpc::InsecureChannelCredentials(), options);
  if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(30))) return 1;
  grpc::GenericStub stub(channel);
  std::atomic<bool> over{false};
  std::mutex lock;
  long ok = 0;
  std::map<std::string, long> failed;
  std::vector<std::thread> threads;
  for (int i = std::stoi(argv[3]); i > 0; --i) {
    threads.emplace_back([&] {
      grpc::CompletionQueue queue;
      while (!over) {
        grpc::Slice slice(request);
        grpc::ByteBuffer message(&slice, 1), answer;
        grpc::ClientContext context;
        grpc::Status status;
        auto call = stub.PrepareUnaryCall(&context, "/inference.GRPCInferenceService/ModelInfer", message, &queue);
        call->StartCall();
        call->Finish(&answer, &status, nullptr);
        void* tag;
        bool fine;
        queue.Next(&tag, &fine);
        std::lock_guard<std::mutex> held(lock);
        if (status.ok()) {
          ++ok;
        } else {
          ++failed[std::to_string(status.error_code()) + ": " + status.error_message()];
        }
      }
    });
  }
  std::string rest{std::istreambuf_iterator<char>(std::cin), {}};
  over = true;
  for (auto& thread : threads) thread.join();
  std::cout << "{\"ok\": " << ok << ", \"failed\": {";
  const char* between = "";
  for (const auto& [said, count] : failed) {
    std::string text = said;
    for (auto& letter : text) if (letter == '"' || letter == '\\' || letter < ' ') letter = ' ';
    std::cout << between << '"' << text << "\": " << count;
    between = ", ";
  }
  std::cout << "}}" << std::endl;
}
