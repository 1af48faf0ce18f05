"""The direct transport: gRPC over libnghttp2, on one thread that reads, with epoll."""
