// Calls servers by turns (round_robin, no health checks, no retries asked for) from many threads until standard input
// ends, then prints how many calls were answered and how many failed, by text, as JSON.
//
// Callers ADDRESS,ADDRESS... REQUEST_FILE CALLERS, where the file has the message of a ModelInfer. grpc-java 1.41 or
// later.
import io.grpc.CallOptions;
import io.grpc.EquivalentAddressGroup;
import io.grpc.ManagedChannel;
import io.grpc.MethodDescriptor;
import io.grpc.NameResolver;
import io.grpc.NameResolverProvider;
import io.grpc.NameResolverRegistry;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.stub.ClientCalls;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetSocketAddress;
import java.net.URI;
import java.nio.file.Files;
import java.nio.file.Paths;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

public class Callers {
  static long ok;
  static final Map<String, Long> failed = new TreeMap<>();
  static volatile boolean over;

  static class Bytes implements MethodDescriptor.Marshaller<byte[]> {
    public InputStream stream(byte[] value) {
      return new ByteArrayInputStream(value);
    }

    public byte[] parse(InputStream stream) {
      try {
        return stream.readAllBytes();
      } catch (IOException error) {
        throw new RuntimeException(error);
      }
    }
  }

  static class Addresses extends NameResolverProvider {
    final List<EquivalentAddressGroup> groups = new ArrayList<>();

    Addresses(String list) {
      for (String address : list.split(",")) {
        int colon = address.lastIndexOf(':');
        int port = Integer.parseInt(address.substring(colon + 1));
        groups.add(new EquivalentAddressGroup(new InetSocketAddress(address.substring(0, colon), port)));
      }
    }

    public NameResolver newNameResolver(URI target, NameResolver.Args arguments) {
      return new NameResolver() {
        public String getServiceAuthority() {
          return "servers";
        }

        public void start(Listener2 listener) {
          listener.onResult(ResolutionResult.newBuilder().setAddresses(groups).build());
        }

        public void shutdown() {}
      };
    }

    public String getDefaultScheme() {
      return "list";
    }

    protected boolean isAvailable() {
      return true;
    }

    protected int priority() {
      return 1;
    }
  }

  public static void main(String[] words) throws Exception {
    byte[] request = Files.readAllBytes(Paths.get(words[1]));
    NameResolverRegistry.getDefaultRegistry().register(new Addresses(words[0]));
    ManagedChannel channel =
        NettyChannelBuilder.forTarget("list:///servers")
            .usePlaintext().defaultLoadBalancingPolicy("round_robin").build();
    MethodDescriptor<byte[], byte[]> infer =
        MethodDescriptor.<byte[], byte[]>newBuilder()
            .setType(MethodDescriptor.MethodType.UNARY)
            .setFullMethodName("inference.GRPCInferenceService/ModelInfer")
            .setRequestMarshaller(new Bytes()).setResponseMarshaller(new Bytes()).build();
    List<Thread> threads = new ArrayList<>();
    for (int i = Integer.parseInt(words[2]); i > 0; --i) {
      Thread thread = new Thread(() -> {
        while (!over) {
          String wrong = null;
          try {
            ClientCalls.blockingUnaryCall(channel, infer, CallOptions.DEFAULT, request);
          } catch (StatusRuntimeException error) {
            wrong = error.getStatus().toString();
          }
          synchronized (Callers.class) {
            if (wrong == null) {
              ++ok;
            } else {
              failed.merge(wrong, 1L, Long::sum);
            }
          }
        }
      });
      thread.start();
      threads.add(thread);
    }
    System.in.readAllBytes();
    over = true;
    for (Thread thread : threads) thread.join();
    List<String> counts = new ArrayList<>();
    failed.forEach((text, count) -> counts.add("\"" + text.replaceAll("[\"\\\\\\p{Cntrl}]", " ") + "\": " + count));
    System.out.println("{\"ok\": " + ok + ", \"failed\": {" + String.join(", ", counts) + "}}");
    System.exit(0);
  }
}
